"""Runs of a row, and rows of equal plans."""

import torch

from models.ops.fla import sequences
from models.ops.runs import Run, grouped_rows, runs
from models.sequence import Fragment, SequenceInfo


def test_fragments_that_continue_each_other_are_joined():
    row = (Fragment(3, 5, 2), Fragment(4, 8, 5), Fragment(2, 12, 0), Fragment(1, 20, 8))
    assert runs(row) == (Run(0, 7, 5, 2), Run(7, 9, 12, 0), Run(9, 10, 20, 8))
    # Next to each other in the packed sequence, but another document.
    assert len(runs((Fragment(3, 0), Fragment(3, 3)))) == 2
    # The same document, but with a gap.
    assert len(runs((Fragment(3, 0), Fragment(3, 6, 6)))) == 2


def test_neighbouring_rows_are_grouped():
    groups = list(grouped_rows(["a", "a", "b", "a"]))
    assert groups == [(slice(0, 2), "a"), (slice(2, 3), "b"), (slice(3, 4), "a")]


def test_flat_sequences_for_fla():
    rows = SequenceInfo.from_fragments([[Fragment(3, 5, 2), Fragment(2, 8)], [Fragment(5, 0)]])
    packed = sequences(rows, torch.device("cpu"))
    assert [x.tolist() for x in packed] == [[0, 3, 5, 10], [0, 2], [1, 2]]
    # Behind a gap too, though the document began before it; joined where one goes on.
    row = [Fragment(3, 5, 2), Fragment(2, 8, 5), Fragment(4, 30, 27)]
    packed = sequences(SequenceInfo.from_fragments([row]), torch.device("cpu"))
    assert [x.tolist() for x in packed] == [[0, 5, 9], [0], [1]]
