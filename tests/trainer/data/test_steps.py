"""Which rows a step takes, on integers: no documents are read here."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import count, islice

import pytest

from trainer.data import Data, TrainStream
from trainer.data.balance import RowCost
from trainer.data.rows import Rows
from trainer.data.stages import build_stages
from trainer.data.steps import Pattern, RowId, Stage
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError


class Numbers(Rows):
    """Rows without content, in epochs that differ in length."""

    def __init__(self, name, size, seq_len):
        self.name, self.size, self.seq_len = name, size, seq_len

    def count(self, epoch):
        return self.size + epoch % 3

    def hash(self, epoch):
        return f"{self.name} {self.size} {self.seq_len} {epoch}"

    def identity(self):
        return {f"data.sources.{self.name} token store": self.size}

    def lengths(self, where):
        epoch, row = where
        return [1 + (7 * row + epoch) % self.seq_len]


class Source:
    def __init__(self, name, size):
        self.name, self.size = name, size

    def rows(self, seq_len):
        return Numbers(self.name, self.size, seq_len)


SIZES = {"a": 5, "b": 11, "c": 29}
WEIGHTS = {"a": 0.2, "b": 0.3, "c": 0.5}


def make(stages, *, sizes=SIZES):
    planned = build_stages(stages, seq_len=16, batch_size=8, weights=WEIGHTS)
    return data_of(planned, sizes)


def data_of(stages, sizes=SIZES):
    sources = {name: Source(name, size) for name, size in sizes.items()}
    return Data(sources=sources, tokenizer=ByteTokenizer(), stages=stages, seq_len=16, seed=0)


def by_definition(data, steps):
    """Rows of each step: a source is read on and on at each length, in the order of a pattern."""

    def endless(source, seq_len):
        rows = data.rows(source, seq_len)
        for epoch in count():
            yield from (RowId(source, epoch, row) for row in range(rows.count(epoch)))

    readers, taken = {}, []
    for stage in data.steps.stages:
        pattern, position = Pattern([stage.weights.get(s, 0.0) for s in SIZES]), 0
        lasting = stage.steps or steps
        for _ in range(min(lasting, steps - len(taken))):
            rows = []
            for _ in range(stage.batch_size):
                source = list(SIZES)[pattern.at(position)[0]]
                key = source, stage.seq_len
                rows.append(next(readers.setdefault(key, endless(*key))))
                position += 1
            taken.append(rows)
    return taken


def read(data, steps, *, ranks, micro_batch_size, balanced, state=None):
    """Rows of each step over all ranks, and the state behind the last, like on every rank."""
    cost = RowCost(token=1.0, pair=0.5) if balanced else None
    share = {"ranks": ranks, "micro_batch_size": micro_batch_size, "cost": cost}
    streams = [TrainStream(data, rank=rank, **share) for rank in range(ranks)]
    taken = []
    for stream in streams:
        if state is not None:
            stream.restore(state)
    for _ in range(steps):
        orders = [stream.order(stream.cursor) for stream in streams]
        for stream in streams:
            stream.cursor += 1
        assert len({len(order.micro_batches) for order in orders}) == 1
        parts = [rows for order in orders for rows in order.micro_batches]
        assert {len(rows) for rows in parts} == {micro_batch_size}
        taken.append([row for rows in parts for row, _ in rows])
    states = [stream.state() for stream in streams]
    assert all(other == states[0] for other in states)
    return taken, json.loads(json.dumps(states[0]))


def random_stage(choose):
    return Stage(
        steps=choose.randint(1, 6),
        seq_len=choose.choice([8, 16]),
        batch_size=choose.choice([4, 8]),
        weights={s: choose.choice([0, 1, 2.5, 7]) for s in "ab"} | {"c": 1},
    )


def stop_change_and_resume(choose):
    """-> the stages as they stand in the end, and the rows of 12 steps, taken a few at a time."""
    stages = [random_stage(choose) for _ in range(3)]
    taken, state = [], None
    while len(taken) < 12:
        data = data_of([*stages[:-1], replace(stages[-1], steps=None)])
        more, state = read(
            data,
            min(choose.randint(1, 5), 12 - len(taken)),
            ranks=choose.choice([1, 2, 4]),
            micro_batch_size=1,
            balanced=choose.random() < 0.5,
            state=state,
        )
        taken += more
        begun = data.steps.begun(len(taken))
        stages = [*begun, *(random_stage(choose) for _ in range(3 - len(begun)))]
        if len(begun) < 3 and choose.random() < 0.5:
            so_far = len(taken) - data.steps.first[len(begun) - 1]
            stages[len(begun) - 1] = replace(begun[-1], steps=so_far + choose.randint(0, 5))
    return data, taken


def test_hundreds_of_schedules_of_stops_changes_and_resumes_read_the_same_rows():
    """Ranks and balance change anywhere, stages that have not begun too, the end of one under way.

    In a step of a balanced order only who takes a row changes.
    """
    for seed in range(300):
        data, taken = stop_change_and_resume(random.Random(seed))
        expected = by_definition(data, len(taken))
        assert [sorted(rows) for rows in taken] == [sorted(rows) for rows in expected], seed


@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (1, 8), (2, 2), (4, 1), (8, 1), (4, 2)])
def test_ranks_take_contiguous_shares_in_the_order_of_the_pattern(ranks, size):
    data = make(None)
    taken, _ = read(data, 40, ranks=ranks, micro_batch_size=size, balanced=False)
    assert taken == by_definition(data, 40)
    seen = Counter(row for rows in taken for row in rows)
    assert set(seen.values()) == {1}


@pytest.mark.parametrize(
    "weights",
    [[1.0], [0.7, 0.3], [1, 2, 4], [1 / 3, 1 / 3, 1 / 3], [3e-5, 1.0], [0.123456789, 0.5, 2]],
)
def test_a_pattern_deals_every_beginning_in_proportion(weights):
    pattern = Pattern(weights)
    shares = [w / sum(weights) for w in weights]
    counters = [0] * len(weights)
    for position in range(2 * pattern.period + 5 if pattern.period < 1000 else 12_000):
        assert pattern.before(position).tolist() == counters
        source, rank = pattern.at(position)
        assert rank == counters[source]
        counters[source] += 1
        for share, dealt in zip(shares, counters, strict=True):
            assert abs(dealt - share * (position + 1)) <= len(weights) / 2 + position * 1e-4
    assert all(counters)


def test_a_source_without_weight_is_never_read():
    assert Pattern([1, 0, 1]).counts.tolist() == [1, 0, 1]
    data = make([{"weights": {"a": 1, "b": 0, "c": 0}}])
    assert {row.source for rows in by_definition(data, 3) for row in rows} == {"a"}
    assert list(data.identity()) == [
        "data.tokenizer",
        "data.seed",
        "data.sources.a token store",
        "steps before data.stages[0]",
        "data.stages[0].seq_len",
        "data.stages[0].batch_size",
        "data.stages[0].weights.a",
        "data.stages[0].rope.base",
        "data.stages[0].rope.factor",
    ]


def test_stages_end_behind_their_tokens_of_full_rows():
    stages: list = [
        {"tokens": 1000, "seq_len": 16, "batch_size": 8},
        {"tokens": 1, "seq_len": 8},
        {},
    ]
    assert make(stages).steps.first == [0, 8, 9]  # 1000 / 128 = 7.8 steps


def test_a_length_that_comes_again_is_read_on():
    stages = [{"tokens": 256}, {"tokens": 64, "seq_len": 8}, {}]
    data = make(stages)
    steps = [data.steps.rows(t) for t in range(5)]
    whole = [row for taken in steps[:2] + steps[3:] for row in taken]
    assert len(set(whole)) == 32
    for source in SIZES:
        rows = [row for row in whole if row.source == source]
        assert rows == sorted(rows)
        first_epoch = [row.row for row in rows if row.epoch == 0]
        assert first_epoch == list(range(len(first_epoch)))
    assert data.steps.epoch(0) == data.steps.epoch(2) == 0
    assert max(islice(map(data.steps.epoch, count(3)), 8)) > 0


BEGUN = [{"tokens": 256}, {"seq_len": 8}]  # two steps, then one without end


@pytest.mark.parametrize(
    ("cursor", "stages"),
    [
        (1, [{"tokens": 128 * 5}, {"seq_len": 8}]),  # the stage under way lasts longer
        (1, None),  # for ever
        (
            2,
            [
                {"tokens": 256},
                {"seq_len": 4, "weights": {"a": 1}},
            ],
        ),  # at the boundary
        (2, None),
        (
            3,
            [{"tokens": 256}, {"seq_len": 8, "tokens": 640}, {"seq_len": 4, "rope": {"base": 7.0}}],
        ),
    ],
)
def test_what_has_not_begun_may_change(cursor, stages):
    _, state = read(make(BEGUN), cursor, ranks=1, micro_batch_size=1, balanced=False)
    TrainStream(make(stages), micro_batch_size=1).restore(state)


@pytest.mark.parametrize(
    ("cursor", "stages", "named"),
    [
        (
            1,
            [{"tokens": 256, "seq_len": 4}, {}],
            r"data\.stages\[0\]\.seq_len=4 \(checkpoint: 16\)",
        ),
        (3, None, r"data\.stages\[1\]\.seq_len=none \(checkpoint: 8\)"),
        (
            3,
            [{"tokens": 128}, {"seq_len": 8}],
            r"steps before data\.stages\[1\]=1 \(checkpoint: 2\)",
        ),
        (
            4,
            [{"tokens": 300}, {"seq_len": 8}],
            r"steps before data\.stages\[1\]=3 \(checkpoint: 2\)",
        ),
        (3, [{"tokens": 256}, {"seq_len": 8, "batch_size": 4}], r"data\.stages\[1\]\.batch_size=4"),
        (
            3,
            [{"tokens": 256, "rope": {"factor": 2.0}}, {"seq_len": 8}],
            r"stages\[0\]\.rope\.factor=2",
        ),
        (
            3,
            [{"tokens": 256}, {"seq_len": 8, "weights": {"a": 1, "b": 1}}],
            r"stages\[1\]\.weights\.a",
        ),
    ],
)
def test_what_has_begun_may_not(cursor, stages, named):
    _, state = read(make(BEGUN), cursor, ranks=1, micro_batch_size=1, balanced=False)
    with pytest.raises(ConfigError, match=named):
        TrainStream(make(stages), micro_batch_size=1).restore(state)


def test_a_source_that_is_read_may_not_change_and_one_that_is_not_may():
    stages = [{"tokens": 256, "weights": {"a": 1}}, {}]
    _, state = read(make(stages), 2, ranks=1, micro_batch_size=1, balanced=False)
    TrainStream(make(stages, sizes=SIZES | {"b": 12}), micro_batch_size=1).restore(state)
    with pytest.raises(ConfigError, match=r"data\.sources\.a token store=6 \(checkpoint: 5\)"):
        TrainStream(make(stages, sizes=SIZES | {"a": 6}), micro_batch_size=1).restore(state)


def test_a_position_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="no position in a packing plan"):
        TrainStream(make(None), micro_batch_size=1).restore({"epoch": 0, "row": 3})


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ([{"tokens": 100, "seq_len": 0}, {}], r"data\.stages\[0\]\.seq_len=0: must be at least 1"),
        ([{}, {}], r"data\.stages\[0\]\.tokens=None: allowed: above 0"),
        ([{"tokens": 0}, {}], r"data\.stages\[0\]\.tokens=0"),
        ([{"tokens": 5}], r"data\.stages\[0\]\.tokens=5: the last stage has no end"),
        ([{"length": 5}], r"data\.stages\[0\]\.length=5: unknown key; allowed: batch_size, rope"),
        (
            [{"weights": {"d": 1}}],
            r"data\.stages\[0\]\.weights\.d=1: no such source; allowed: a, b",
        ),
        ([{"weights": {"a": -1}}], r"data\.stages\[0\]\.weights\.a=-1: must be at least 0"),
        ([{"weights": {"a": 0}}], r"data\.stages\[0\]\.weights=.*: must not all be 0"),
        ([{"rope": {"base": 0}}], r"data\.stages\[0\]\.rope\.base is 0; allowed: above 0"),
        ([{"rope": {"theta": 1}}], r"data\.stages\[0\]\.rope\.theta=1: unknown key"),
        ([7], r"data\.stages\[0\]=7: allowed: a section"),
    ],
)
def test_wrong_stages_name_their_key(stages, named):
    with pytest.raises(ConfigError, match=named):
        make(stages)


def test_a_stage_whose_batch_does_not_divide_is_named():
    data = make([{"tokens": 256}, {"batch_size": 6}])
    with pytest.raises(
        ConfigError, match=r"data\.stages\[1\]\.batch_size=6: must be a multiple of 4"
    ):
        TrainStream(data, micro_batch_size=1, ranks=4)
