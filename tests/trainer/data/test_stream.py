import json
import random

import pytest
import torch

from tests.trainer.data.helpers import build, packed, read, write_documents
from trainer.data import TrainStream
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_documents(folder / "text")
    return folder


def take(data, steps, *, ranks=1, micro_batch_size=1, state=None, kind=TrainStream):
    """Tokens and labels of each step, [batch_size, seq] each, and the state behind the last."""
    streams = [
        kind(data, micro_batch_size=micro_batch_size, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for stream in streams:
        if state is not None:
            stream.restore(json.loads(json.dumps(state)))
    taken = []
    for _ in range(steps):
        shares = [stream.next_step() for stream in streams]
        assert {len(share) for share in shares} == {8 // ranks // micro_batch_size}
        batches = [batch for share in shares for batch in share]
        assert all(batch.tokens.shape == (micro_batch_size, 16) for batch in batches)
        taken.append(torch.cat([torch.stack([b.tokens, b.labels], 1) for b in batches]))
    states = [stream.state() for stream in streams]
    assert all(other == states[0] for other in states)
    return taken, states[0]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_reads_the_plan_in_order_over_epoch_ends(folder):
    data = build(folder)
    rows = [(epoch, row) for epoch in range(4) for row in range(packed(data).count(epoch))]
    taken, state = take(data, len(rows) // 8)
    expected = [read(data, *rows[i : i + 8]) for i in range(0, len(rows) - 7, 8)]
    assert same(taken, [torch.stack([b.tokens, b.labels], 1) for b in expected])
    assert state["cursor"] == len(rows) // 8


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_micro_batches_do_not_change_a_step(folder, ranks, micro_batch_size):
    data = build(folder)
    expected, end = take(data, 9)
    taken, state = take(data, 9, ranks=ranks, micro_batch_size=micro_batch_size)
    assert same(taken, expected)
    assert state == end


@pytest.mark.parametrize("seed", range(8))
def test_resuming_with_other_ranks_reads_on_exactly(folder, seed):
    expected, end = take(build(folder), 24)
    choose, taken, state = random.Random(seed), [], None
    while len(taken) < 24:
        steps = min(choose.randint(1, 6), 24 - len(taken))
        ranks, micro_batch_size = choose.choice([1, 2, 4]), choose.choice([1, 2])
        more, state = take(
            build(folder), steps, ranks=ranks, micro_batch_size=micro_batch_size, state=state
        )
        taken += more
    assert same(taken, expected)
    assert state == end


def test_a_step_may_span_epochs(tmp_path):
    write_documents(tmp_path / "text", [3, 40])
    data = build(tmp_path, eval_fraction=0.0)
    rows = packed(data).count(0)
    assert rows == 3
    stream = TrainStream(data, micro_batch_size=8)
    (batch,) = stream.next_step()
    expected = read(data, *((i // rows, i % rows) for i in range(8)))
    assert torch.equal(batch.tokens, expected.tokens)
    assert stream.epoch == 2


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seq_len", 32, r"data\.seq_len=32 \(checkpoint: 16\)"),
        ("seed", 7, r"data\.seed=7 \(checkpoint: 0\)"),
        ("batch_size", 4, r"data\.batch_size=4 \(checkpoint: 8\)"),
        ("overlong", "drop", r"data\.overlong=drop \(checkpoint: split\)"),
        ("eval_fraction", 0.0, r"data\.eval_fraction=0\.0 \(checkpoint: 0\.25\)"),
    ],
)
def test_a_resume_names_what_changed(folder, key, value, named):
    _, state = take(build(folder), 1)
    stream = TrainStream(build(folder, **{key: value}), micro_batch_size=1)
    with pytest.raises(ConfigError, match=named):
        stream.restore(state)


def test_a_resume_names_other_documents_and_other_tokenizers(folder, tmp_path, monkeypatch):
    _, state = take(build(folder), 1)
    write_documents(tmp_path / "text", [30, 40])
    with pytest.raises(ConfigError, match=r"token store=[0-9a-f]{12} "):
        TrainStream(build(tmp_path), micro_batch_size=1).restore(state)
    monkeypatch.setattr("trainer.data.tokenizer.ByteTokenizer.fingerprint", "other")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=other "):
        TrainStream(build(folder), micro_batch_size=1).restore(state)


def test_a_plan_that_cannot_be_made_again_is_refused(folder):
    _, state = take(build(folder), 1)
    with pytest.raises(ConfigError, match="packing plan"):
        TrainStream(build(folder), micro_batch_size=1).restore(state | {"plan": "0" * 64})


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "named"),
    [
        (3, 1, r"data\.batch_size=8: must be a multiple of 3 data ranks"),
        (2, 8, r"data\.batch_size=8: .*trainer\.micro_batch_size=8"),
        (1, 0, r"trainer\.micro_batch_size=0"),
    ],
)
def test_batch_size_must_divide(folder, ranks, micro_batch_size, named):
    with pytest.raises(ConfigError, match=named):
        TrainStream(build(folder), ranks=ranks, micro_batch_size=micro_batch_size)
