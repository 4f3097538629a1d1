from collections import Counter

import numpy as np
import pytest

from trainer.data.packing import best_fit
from trainer.data.plan import LongDocuments, make_plan, permutation

SEQ_LENS = [1, 2, 7, 64, 1000]


def some_lengths(seed, count=300, longest=200):
    generator = np.random.default_rng(seed)
    return np.ceil(longest ** generator.random(count)).astype(np.int64)


def packed(seq_len, *, seed=0, **kwargs):
    lengths = some_lengths(seed)
    return make_plan(np.arange(len(lengths)) * 3, lengths, seq_len=seq_len, **kwargs), lengths


def best_fit_by_definition(lengths, capacity):
    """Rows as lists of lengths: longest first, each into the fullest row that has room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capacity", [200, 211, 1000])
def test_best_fit_equals_its_definition(seed, capacity):
    lengths = some_lengths(seed, count=30 * 2**seed // 4 + 1)
    filled = np.bincount(best_fit(lengths, capacity), weights=lengths)
    # Rows of equal room are interchangeable, so how full rows get is determined, not who is where.
    expected = [sum(row) for row in best_fit_by_definition(lengths.tolist(), capacity)]
    assert sorted(filled) == sorted(expected)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("shuffle", [None, (0, 0), (5, 3)])
@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_every_token_lies_in_one_row_and_no_row_overflows(seq_len, shuffle, packing):
    plan, lengths = packed(seq_len, shuffle=shuffle, packing=packing)
    covered = Counter()
    for row in range(plan.rows):
        pieces = plan.row(row)
        assert pieces
        assert sum(piece.length for piece in pieces) <= seq_len
        for document, start, length in pieces:
            covered.update((document, start + i) for i in range(length))
    assert covered == Counter((3 * d, i) for d, n in enumerate(lengths) for i in range(n))
    assert plan.tokens == lengths.sum()
    pieces = Counter(piece.document for row in range(plan.rows) for piece in plan.row(row))
    cut = [document // 3 for document, count in pieces.items() if count > 1]
    assert plan.cut_documents == len(cut) and plan.cut_tokens == lengths[cut].sum()
    if packing == "best_fit":
        assert plan.cut_documents == (lengths > seq_len).sum()
    assert plan.padding_share == pytest.approx(1 - lengths.sum() / (plan.rows * seq_len))


@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_documents_that_fit_stay_whole_and_others_are_cut_at_seq_len(seq_len):
    plan, lengths = packed(seq_len, shuffle=(0, 0))
    pieces = [piece for row in range(plan.rows) for piece in plan.row(row)]
    assert len(pieces) == sum(-(-n // seq_len) for n in lengths.tolist())
    assert all(piece.start % seq_len == 0 for piece in pieces)


def test_drop_leaves_out_long_documents_and_counts_them():
    plan, lengths = packed(64, shuffle=(0, 0), overlong="drop")
    kept = {piece.document // 3 for row in range(plan.rows) for piece in plan.row(row)}
    assert kept == set(np.flatnonzero(lengths <= 64).tolist())
    assert plan.dropped_documents == (lengths > 64).sum() > 0
    assert plan.dropped_tokens == lengths[lengths > 64].sum()
    assert plan.cut_documents == 0
    assert make_plan(np.arange(2), np.array([65, 70]), seq_len=64, overlong="drop").rows == 0


@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_concat_fills_every_row_but_one_and_keeps_neighbours_together(seq_len):
    plan, lengths = packed(seq_len, shuffle=(0, 0), packing="concat")
    filled = [sum(piece.length for piece in plan.row(row)) for row in range(plan.rows)]
    assert sorted(filled)[1:] == [seq_len] * (plan.rows - 1)
    assert plan.rows == -(-lengths.sum() // seq_len)
    in_order, _ = packed(seq_len, packing="concat")
    pieces = [piece for row in range(in_order.rows) for piece in in_order.row(row)]
    assert pieces == sorted(pieces)


def test_long_documents_come_several_times_an_epoch():
    long = LongDocuments(above=50, repeat=3)
    for packing in ("best_fit", "concat"):
        plan, lengths = packed(64, shuffle=(0, 0), packing=packing, long_documents=long)
        tokens = Counter()
        for row in range(plan.rows):
            for document, _, length in plan.row(row):
                tokens[document // 3] += length
        expected = {d: n * (3 if n > 50 else 1) for d, n in enumerate(lengths.tolist())}
        assert tokens == expected
        assert plan.documents == len(lengths) + 2 * (lengths > 50).sum()


def test_plans_take_four_bytes_a_number_where_that_is_enough():
    plan, _ = packed(64, shuffle=(0, 0))
    assert {x.dtype.itemsize for x in (plan.document, plan.start, plan.length)} == {4}
    long = make_plan(np.array([7]), np.array([2**31 + 5]), seq_len=2**30)
    assert [(p.start, p.length) for row in range(3) for p in long.row(row)][-1] == (2**31, 5)
    assert long.start.dtype.itemsize == 8


def test_is_a_pure_function_of_seed_and_epoch():
    hashes = {packed(64, shuffle=key)[0].hash for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(hashes) == 4
    assert packed(64, shuffle=(1, 1))[0].hash in hashes
    assert packed(64, shuffle=(0, 0), seed=9)[0].hash not in hashes
    assert packed(63, shuffle=(0, 0))[0].hash not in hashes


def test_order_is_the_one_checkpoints_rely_on():
    """A change here makes every earlier run impossible to resume."""
    assert permutation(8, (0, 0, 0)).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    lengths = 1 + np.arange(100) * 37 % 97
    plan = make_plan(np.arange(100), lengths, seq_len=64, shuffle=(0, 0))
    assert plan.hash[:16] == "161084e07cb16ad3"


def test_epochs_mix_documents_anew():
    plans = [packed(64, shuffle=(0, epoch))[0] for epoch in range(2)]
    rows = [{frozenset(plan.row(row)) for row in range(plan.rows)} for plan in plans]
    mixed = [{row for row in epoch if len(row) > 1} for epoch in rows]
    assert len(mixed[0] & mixed[1]) < 0.2 * len(mixed[0])
    lengths = plans[0].length[plans[0].bounds[:-1]]
    assert np.abs(np.diff(lengths)).mean() > 5  # rows do not come by falling length
    assert (np.diff(plans[0].length) > 0).mean() > 0.2  # nor pieces inside them


def test_without_shuffle_documents_keep_their_order():
    plan, _ = packed(64)
    assert all(plan.row(row) == sorted(plan.row(row)) for row in range(plan.rows))
