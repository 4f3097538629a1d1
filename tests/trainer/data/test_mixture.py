"""Several sources as one: each has its own store, split and plan."""

from collections import Counter
from itertools import islice, pairwise

import pytest

from tests.trainer.data.helpers import build, packed, write_documents
from tests.trainer.data.test_dataset import document_pairs, scored_pairs
from trainer.data import TrainStream
from trainer.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_documents(folder / "text")
    write_documents(folder / "other", [3, 50, 14, 33, 8, 70, 21, 13, 29])
    return folder


def mixture(folder, changes=None, **top):
    sources = {
        "a": {"source": "files", "path": str(folder / "text"), "weight": 0.25},
        "b": {"source": "files", "path": str(folder / "other"), "weight": 0.75},
    }
    for name, keys in (changes or {}).items():
        sources[name] = sources.get(name, {}) | keys
    return build(folder, **{"source": "mixture", "path": None, "sources": sources} | top)


def test_rows_come_in_proportion_and_every_epoch_of_a_source_is_whole(folder):
    data = mixture(folder)
    stream = TrainStream(data, micro_batch_size=8)
    pairs = {"a": Counter(), "b": Counter()}
    per_epoch = {name: packed(data, name).count(0) for name in pairs}
    dealt = Counter()
    for batch in (batch for _ in range(12) for batch in stream.next_step()):
        for i, label in enumerate(batch.source.partition(":")[0].split(", ")):
            name, _, epoch, *_ = label.split()
            dealt[name] += 1
            if epoch == "0":
                tokens, labels = batch.tokens[i], batch.labels[i]
                valid = labels != -100
                pairs[name].update(zip(tokens[valid].tolist(), labels[valid].tolist(), strict=True))
    assert (dealt["a"], dealt["b"]) == (24, 72)
    for name, corpus in data.sources.items():
        assert dealt[name] > per_epoch[name]
        expected = Counter()
        for document in corpus.documents("train"):
            expected.update(pairwise(corpus.store.read(document, 0, 10**6).tolist()))
        assert pairs[name] == expected


def test_evaluation_scores_every_source_and_any_beginning_of_it_in_proportion(folder):
    data = mixture(folder)
    batches = list(data.eval_batches(micro_batch_size=1, split="all"))
    expected = Counter()
    for corpus in data.corpora.values():
        expected += document_pairs(corpus, corpus.documents("all"))
    assert sum(map(scored_pairs, batches), Counter()) == expected
    names = [batch.source.removeprefix("evaluation, ")[0] for batch in batches]
    half = len(names) // 2
    assert abs(names[:half].count("a") - names[half:].count("a")) <= 2


def test_long_documents_come_again_within_their_source_alone(folder):
    plain = mixture(folder)
    data = mixture(folder, {"b": {"long_documents": {"above": 30, "repeat": 3}}})
    times = Counter(
        (piece.document, piece.start)
        for row in range(packed(data, "b").count(0))
        for piece in packed(data, "b").plan(0).row(row)
    )
    lengths = data.sources["b"].store.lengths
    for (document, _), found in times.items():
        assert found == (3 if lengths[document] > 30 else 1)
    assert {3, 1} == set(times.values())
    assert packed(data, "a").hash(0) == packed(plain, "a").hash(0)
    shares = [row.source for t in range(10) for row in data.steps.rows(t)]
    assert shares == [row.source for t in range(10) for row in plain.steps.rows(t)]


def test_sources_may_differ_in_policy(folder):
    data = mixture(folder, {"a": {"overlong": "drop"}, "b": {"packing": "concat"}})
    assert packed(data, "a").plan(0).dropped_documents > 0
    assert packed(data, "b").plan(0).padding_share < 1 / packed(data, "b").count(0)


@pytest.mark.parametrize(
    ("changes", "top", "named"),
    [
        ({}, {"sources": None}, r"data\.sources=null: data=mixture needs"),
        ({}, {"path": "x"}, r"data\.path=x: data=mixture takes data\.sources\.<name>\.path"),
        ({}, {"source": "files", "path": "x"}, r"data\.sources=\['a', 'b'\]: data=mixture takes"),
        ({"a": {"weight": -1}}, {}, r"data\.sources\.a\.weight=-1: must be a number, at least 0"),
        ({"a": {"weight": "much"}}, {}, r"data\.sources\.a\.weight=much: must be a number"),
        ({"a": {"weight": 0}, "b": {"weight": 0}}, {}, r"data\.sources=.*: must not all be 0"),
        (
            {"a": {"seq_len": 4}},
            {},
            r"data\.sources\.a\.seq_len=4: unknown key; allowed: .*packing",
        ),
        ({"a": {"overlong": "cut"}}, {}, r"data\.sources\.a\.overlong=cut: allowed: split, drop"),
        ({"a": {"eval_fraction": 1.5}}, {}, r"data\.sources\.a\.eval_fraction=1\.5: must be in"),
        ({"a": {"source": "mixture"}}, {}, r"data\.sources\.a: data\.source=mixture: must be"),
        ({"a": {"path": "/nowhere"}}, {}, r"data\.sources\.a: data\.path=/nowhere: cannot read"),
        ({"c": {"weight": 1}}, {}, r"data\.sources\.c\.source: missing"),
        (
            {"a": {"long_documents": {"above": 5, "repeat": 0}}},
            {},
            r"data\.sources\.a\.long_documents\.repeat is 0; allowed: 1 or more",
        ),
        (
            {"a": {"long_documents": {"above": 16, "repeat": 2}, "overlong": "drop"}},
            {},
            r"data\.sources\.a\.long_documents\.above=16: with overlong=drop and data\.seq_len=16",
        ),
    ],
)
def test_wrong_mixtures_name_their_key(folder, changes, top, named):
    with pytest.raises(ConfigError, match=named):
        mixture(folder, changes, **top)


def test_one_line_of_a_batch_names_sources(folder):
    stream = TrainStream(mixture(folder), micro_batch_size=2)
    (batch,) = islice(stream.next_step(), 1)
    assert batch.source.startswith(("a epoch 0 row 0, b epoch 0 row 0: ", "b epoch 0 row 0, "))
