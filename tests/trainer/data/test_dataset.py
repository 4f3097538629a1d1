from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tests.trainer.data.helpers import LENGTHS, build, corpus, packed, read, write_documents
from trainer.batch import IGNORE_INDEX
from trainer.data.corpus import held_out
from trainer.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    write_documents(tmp_path / "text")
    return tmp_path


def scored_pairs(batch):
    """(token, next token) of every valid label."""
    valid = batch.labels != IGNORE_INDEX
    return Counter(zip(batch.tokens[valid].tolist(), batch.labels[valid].tolist(), strict=True))


def document_pairs(corpus, documents):
    pairs = Counter()
    for document in documents:
        tokens = corpus.store.read(document, 0, 10**9).tolist()
        pairs.update(pairwise(tokens))
    return pairs


@pytest.mark.parametrize("seq_len", [1, 2, 16, 100])
def test_an_epoch_scores_every_token_with_a_successor_once(folder, seq_len):
    data = build(folder, seq_len=seq_len)
    pairs = Counter()
    for row in range(packed(data).count(0)):
        pairs += scored_pairs(read(data, (0, row)))
    assert pairs == document_pairs(corpus(data), corpus(data).documents("train"))


@pytest.mark.parametrize("split", ["train", "eval", "all"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_evaluation_scores_every_token_once_on_some_rank(folder, ranks, split):
    data = build(folder)
    shares = [
        list(data.eval_batches(micro_batch_size=2, rank=rank, ranks=ranks, split=split))
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert all(1 <= batch.tokens.shape[0] <= 2 for batch in batches)
    assert all(batch.valid_labels == (batch.labels != -100).sum() for batch in batches)
    pairs = sum((scored_pairs(batch) for batch in batches), Counter())
    assert pairs == document_pairs(corpus(data), corpus(data).documents(split))


def test_evaluation_drops_no_long_document(folder):
    data = build(folder, overlong="drop")
    pairs = sum(map(scored_pairs, data.eval_batches(micro_batch_size=4, split="all")), Counter())
    assert pairs == document_pairs(corpus(data), range(len(LENGTHS)))


def test_rows_hold_documents_in_their_fragments_and_then_padding(folder):
    data = build(folder)
    for row, pieces in (
        (row, packed(data).plan(0).row(row)) for row in range(packed(data).count(0))
    ):
        batch = read(data, (0, row))
        (fragments,) = batch.info.fragments
        assert [f.length for f in fragments if not f.padding] == [p.length for p in pieces]
        assert (batch.tokens[~batch.info.valid] == data.tokenizer.pad_id).all()
        assert (batch.labels[~batch.info.valid] == IGNORE_INDEX).all()


def test_batch_names_rows_and_documents(folder):
    data = build(folder, seq_len=200)
    source = read(data, (2, 0)).source
    assert source.startswith("epoch 2 row 0: 0")
    assert source.endswith(" and more")
    assert source.count(",") == 3


def test_splits_are_disjoint_complete_and_seed_free(folder):
    made = corpus(build(folder))
    train, evaluation = made.documents("train"), made.documents("eval")
    assert 0 < len(evaluation) < len(train)
    assert sorted([*train, *evaluation]) == made.documents("all").tolist()
    assert corpus(build(folder, seed=1)).documents("eval").tolist() == evaluation.tolist()


def test_copies_share_a_side(folder):
    for path in list((folder / "text").iterdir()):
        path.with_name(f"copy_{path.name}").write_bytes(path.read_bytes())
    made = corpus(build(folder))
    sides = {"train": set(), "eval": set()}
    for side, contents in sides.items():
        contents.update(
            bytes(made.store.read(i, 0, 99)[:-1].astype(np.uint8)) for i in made.documents(side)
        )
    assert not sides["train"] & sides["eval"]


def test_held_out_share_follows_the_fraction():
    digests = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    assert held_out(digests, 0.02).mean() == pytest.approx(0.02, rel=0.1)
    assert (held_out(digests, 0.02) <= held_out(digests, 0.1)).all()
    assert not held_out(digests, 0.0).any()


def test_something_is_left_to_train_on(tmp_path):
    write_documents(tmp_path / "text", [50])
    data = build(tmp_path, eval_fraction=0.9999999)
    assert packed(data).count(0) == 4
    assert not list(data.eval_batches(micro_batch_size=1))
    assert len(list(data.eval_batches(micro_batch_size=1, split="all"))) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_len", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("eval_fraction", 1.0),
        ("eval_fraction", -0.1),
        ("workers", -1),
    ],
)
def test_bad_values_name_their_key(folder, key, value):
    with pytest.raises(ConfigError, match=rf"^data\.{key}={value}: must be "):
        build(folder, **{key: value})


def test_dropping_everything_is_refused(folder):
    with pytest.raises(ConfigError, match=r"data\.overlong=drop .*data\.seq_len=1 .* 2 tokens"):
        build(folder, overlong="drop", seq_len=1)
