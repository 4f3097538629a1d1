"""Where tokens sit: what is derived from fragments, and what is refused."""

import pytest

from models.sequence import Fragment, SequenceInfo
from tests.helpers import scattered_info


def test_tensors_follow_the_fragments():
    info = SequenceInfo.from_fragments([[Fragment(3, 7, 2), Fragment(2, 20, padding=True)]])
    assert info.shape == (1, 5)
    assert info.index.tolist() == [[7, 8, 9, 20, 21]]
    assert info.positions.tolist() == [[2, 3, 4, 0, 1]]
    assert info.valid.tolist() == [[True, True, True, False, False]]


def test_starts_are_at_documents_and_behind_gaps():
    starts = [[t for t, start in enumerate(row) if start] for row in scattered_info().starts]
    assert starts == [[9, 10], [0, 2, 8, 11]]  # the first row goes on from another


def test_rows_hold_equally_many_tokens():
    for rows in ([], [[]], [[Fragment(2, 0)], [Fragment(3, 0)]]):
        with pytest.raises(ValueError, match="rows must hold equally many tokens"):
            SequenceInfo.from_fragments(rows)


def test_history_ends_with_the_last_token():
    info = SequenceInfo.from_fragments([[Fragment(2, 30, 20)]] * 2).history(5)
    assert info.index.tolist() == [[27, 28, 29, 30, 31]] * 2
    assert info.positions.tolist() == [[17, 18, 19, 20, 21]] * 2


@pytest.mark.parametrize(
    ("info", "length"),
    [
        (SequenceInfo.from_lengths([[3, 5]]), 8),
        (SequenceInfo.from_lengths([[5], [3]], padding=[0, 2]), 5),
        (SequenceInfo.span(1, 4, 6), 7),
    ],
    ids=["packed", "unequal", "before the start"],
)
def test_history_of_anything_else_is_refused(info, length):
    with pytest.raises(ValueError, match="one document in every row"):
        info.history(length)


def test_the_first_tokens_of_rows():
    info = SequenceInfo.from_lengths([[3, 5], [6, 1]], padding=[0, 1])
    for length in range(1, 9):
        first = info.first(length)
        again = SequenceInfo.from_fragments(first.fragments)
        assert first.shape == (2, length)
        for key in ("index", "positions", "valid"):
            cut = getattr(info, key)[:, :length].tolist()
            assert getattr(first, key).tolist() == getattr(again, key).tolist() == cut
