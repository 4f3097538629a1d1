import json
import random
from collections import Counter

import pytest

from tests.trainer.data.helpers import build, corpus, write_documents
from tests.trainer.data.test_dataset import document_pairs, scored_pairs
from tests.trainer.data.test_stream import same, take
from tests.trainer.evals.helpers import hugging_face
from trainer.data import DocumentStream, TrainStream
from trainer.data.streaming import Position
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_documents(folder / "text")
    return folder


def streamed(folder, **changes):
    return build(folder, streaming=True, **changes)


def rows_of(data, epochs):
    """The batches of one row each, of so many epochs, and the stream behind them."""
    stream = DocumentStream(data, micro_batch_size=1)
    stream.data.batch_size = 1
    found = []
    while stream.epoch < epochs:
        (batch,) = stream.next_step()
        found.append(batch)
    return found, stream


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("seq_len", [2, 16, 100])
def test_an_epoch_scores_every_token_once_and_none_that_is_held_out(folder, seq_len, window):
    prepared = corpus(build(folder, seq_len=seq_len))
    expected = document_pairs(prepared, prepared.documents("train"))
    batches, _ = rows_of(streamed(folder, seq_len=seq_len, window=window), 2)
    pairs = sum(map(scored_pairs, batches), Counter())
    assert pairs == expected + expected


def test_epochs_come_in_other_orders(folder):
    batches, _ = rows_of(streamed(folder), 2)
    half = len(batches) // 2
    first, second = ([b.tokens.tolist() for b in part] for part in (batches[:half], batches[half:]))
    assert first != second
    other, _ = rows_of(streamed(folder, seed=1), 1)
    assert [b.tokens.tolist() for b in other] != first


def test_the_same_documents_are_held_out_as_from_a_store(folder):
    prepared, data = corpus(build(folder)), streamed(folder, eval_documents=100)
    held = prepared.documents("eval")
    for ranks in (1, 3):
        shares = [
            list(data.eval_batches(micro_batch_size=2, rank=rank, ranks=ranks))
            for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        pairs = sum((scored_pairs(batch) for share in shares for batch in share), Counter())
        assert pairs == document_pairs(prepared, held)
    few = streamed(folder, eval_documents=2)
    pairs = sum(map(scored_pairs, few.eval_batches(micro_batch_size=1)), Counter())
    assert pairs == document_pairs(prepared, held[:2])
    assert not list(streamed(folder, eval_fraction=0.0).eval_batches(micro_batch_size=1))


def test_documents_start_and_end_as_in_a_store(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("one", "other"):
        (tmp_path / "text" / name).write_text(f"the {name} dog")
    options = {"tokenizer": hugging_face(tmp_path, start=True), "eval_fraction": 0.0}
    store = corpus(build(tmp_path, **options)).store
    stored = [store.read(i, 0, int(store.lengths[i])).tolist() for i in range(len(store))]
    found = [d.tokens.tolist() for d in streamed(tmp_path, **options).documents(Position())]
    assert len(stored) == 2 and sorted(found) == sorted(stored)
    assert all((d[0], d[-1]) == (0, 1) and min(d[1:-1]) > 1 for d in stored)
    (batch,), _ = rows_of(streamed(tmp_path, **options), 1)
    assert 1 in batch.labels and 0 not in batch.labels  # no document foretells the next one


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_micro_batches_do_not_change_a_step(folder, ranks, micro_batch_size):
    expected, end = take(streamed(folder), 9, kind=DocumentStream)
    taken, state = take(
        streamed(folder), 9, ranks=ranks, micro_batch_size=micro_batch_size, kind=DocumentStream
    )
    assert same(taken, expected)
    assert state == end


@pytest.mark.parametrize("seed", range(8))
def test_resuming_with_other_ranks_reads_on_exactly(folder, seed):
    expected, end = take(streamed(folder), 24, kind=DocumentStream)
    choose, taken, state = random.Random(seed), [], None
    while len(taken) < 24:
        steps = min(choose.randint(1, 6), 24 - len(taken))
        ranks, micro_batch_size = choose.choice([1, 2, 4]), choose.choice([1, 2])
        sizes = {"ranks": ranks, "micro_batch_size": micro_batch_size}
        more, state = take(streamed(folder), steps, **sizes, state=state, kind=DocumentStream)
        taken += more
    assert same(taken, expected)
    assert state == end
    assert len(json.dumps(state)) < 700


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seq_len", 32, r"data\.seq_len=32 \(checkpoint: 16\)"),
        ("window", 4, r"data\.window=4 \(checkpoint: 3\)"),
    ],
)
def test_a_resume_names_what_changed(folder, key, value, named):
    _, state = take(streamed(folder), 1, kind=DocumentStream)
    stream = DocumentStream(streamed(folder, **{key: value}), micro_batch_size=1)
    with pytest.raises(ConfigError, match=named):
        stream.restore(state)


def test_a_resume_names_other_files_and_a_store(folder, tmp_path):
    _, state = take(streamed(folder), 1, kind=DocumentStream)
    write_documents(tmp_path / "text", [30, 40])
    with pytest.raises(ConfigError, match=r"data\.streaming source="):
        DocumentStream(streamed(tmp_path), micro_batch_size=1).restore(state)
    prepared = TrainStream(build(folder), micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"data\.streaming=false"):
        prepared.restore(state)
    with pytest.raises(ConfigError, match=r"data\.streaming=true"):
        DocumentStream(streamed(folder), micro_batch_size=1).restore(prepared.state())


def test_long_documents_are_dropped_by_policy(tmp_path):
    write_documents(tmp_path / "text", [3, 40, 5, 90, 7])
    data = streamed(tmp_path, overlong="drop", eval_fraction=0.0, window=100)
    batches, _ = rows_of(data, 1)
    assert sum(batch.valid_labels for batch in batches) == 3 + 5 + 7


@pytest.mark.parametrize(("lengths", "changes"), [([0, 0], {}), ([40, 90], {"overlong": "drop"})])
def test_a_stream_without_documents_ends(tmp_path, lengths, changes):
    write_documents(tmp_path / "text", lengths)
    stream = DocumentStream(streamed(tmp_path, eval_fraction=0.0, **changes), micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"data\.path=.*no document is left to train on"):
        stream.next_step()


def test_batches_name_their_documents(folder):
    (batch,) = DocumentStream(streamed(folder, seq_len=200), micro_batch_size=8).next_step()
    assert batch.source.startswith("0") and batch.source.endswith(" and more")


@pytest.mark.parametrize(("key", "value"), [("window", 0), ("eval_documents", -1), ("seq_len", 0)])
def test_bad_values_name_their_key(folder, key, value):
    with pytest.raises(ConfigError, match=rf"^data\.{key}={value}: must be "):
        streamed(folder, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("packing", "concat"),
        ("stages", [{"seq_len": 8}]),
        ("balance", True),
        ("workers", 2),
        ("sources", {"a": {}}),
    ],
)
def test_what_only_plans_have_is_refused(folder, key, value):
    with pytest.raises(ConfigError, match=rf"^data\.{key}=") as error:
        streamed(folder, **{key: value})
    assert key == "sources" or "data.streaming=false" in str(error.value)
