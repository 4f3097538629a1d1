import numpy as np
import pytest

from tests.trainer.data.helpers import build, corpus, packed, write_documents
from trainer.data import TrainStream
from trainer.data.balance import RowCost
from trainer.data.report import by_length, describe
from trainer.sharder import Sharder

COST = RowCost(token=1.0, pair=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_documents(folder / "text")
    write_documents(folder / "other", [100] * 5)
    return folder


def test_tokens_and_pairs_by_document_length_are_those_of_the_rows(folder):
    data = build(folder)
    expected = np.zeros((2, 64))
    rows, lengths = packed(data), corpus(data).store.lengths
    for row in range(rows.count(0)):
        for piece in rows.plan(0).row(row):
            power = len(f"{int(lengths[piece.document]):b}") - 1
            expected[:, power] += piece.length, piece.length * (piece.length + 1) // 2
    found = by_length(rows.plan(0), lengths)
    assert found.tolist() == expected.tolist()
    assert found[0].sum() == rows.plan(0).tokens


def test_lines_for_one_rank_tell_documents_and_lengths(folder):
    data = build(folder)
    lines = describe(TrainStream(data, micro_batch_size=1), COST, None)
    assert len(lines) == 2
    assert lines[0] == f"data    20 documents, 7 held out; {packed(data).plan(0)}"
    assert lines[1].startswith("lengths tokens, attention by document length: <4 ")
    shares = [part.rpartition(" ")[0].rpartition(" ")[2] for part in lines[1].split("; ")]
    assert sum(int(share.rstrip("%,")) for share in shares) == pytest.approx(100, abs=4)


def test_lines_for_ranks_tell_how_even_their_work_is(folder):
    data = build(folder)
    sharder = Sharder(rank=0, ranks=2, strategy="balanced", multiple=1, pad_id=257)
    lines = describe(TrainStream(data, micro_batch_size=1, ranks=4), COST, sharder)
    planned, balanced = (float(x) for x in lines[2].split() if x.startswith("1."))
    assert lines[2].startswith("work    of data ranks, max/mean:") and planned > balanced >= 1
    assert lines[3].startswith("work    of context ranks, max/mean: softmax area 1.")


def test_a_mixture_has_a_line_for_each_source_and_lengths_by_weight(folder):
    sources = {
        "few": {"source": "files", "path": str(folder / "text"), "weight": 1},
        "long": {"source": "files", "path": str(folder / "other"), "weight": 3},
    }
    data = build(folder, source="mixture", path=None, sources=sources, eval_fraction=0.0)
    lines = describe(TrainStream(data, micro_batch_size=1), COST, None)
    assert [line.split(":")[0] for line in lines[:2]] == [
        "data    few (25.0%)",
        "data    long (75.0%)",
    ]
    share = float(lines[2].rpartition("; 64 ")[2].split("%")[0])
    assert share > 75  # those of 101 tokens are in the bin of 64
