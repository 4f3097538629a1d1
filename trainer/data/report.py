"""What a run is about to read, in a few lines: documents by length, cuts, how even the work is."""

from collections.abc import Iterator
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from models.sequence import SequenceInfo
from parallel.layout import TokenLayout
from trainer.batch import one_sequence
from trainer.data.balance import RowCost, imbalance, spread
from trainer.data.corpus import Corpus, PackedRows
from trainer.data.plan import Plan
from trainer.data.stream import TrainStream
from trainer.sharder import Sharder

SAMPLED_ROWS = 512  # behind figures of work
SAMPLED_LAYOUTS = 16
RARE = 0.01  # bins at the short end with less of the tokens are told as one


def describe(stream: TrainStream, cost: RowCost, sharder: Sharder | None) -> list[str]:
    """Of the stage that the next step belongs to."""
    data, steps = stream.data, stream.data.steps
    stage, lines, bins = steps.stage(stream.cursor), [], np.zeros((2, 64))
    for row in steps.next_rows(steps.index(stream.cursor), stream.cursor):
        rows, source = data.rows(row.source, stage.seq_len), data.sources[row.source]
        if isinstance(rows, PackedRows) and isinstance(source, Corpus):
            plan, share = rows.plan(row.epoch), stage.share(row.source)
            lines.append(_documents(source, plan, row.source and f"{row.source} ({share:.1%}): "))
            bins += share / plan.rows * by_length(plan, source.store.lengths)
    if bins.any():
        lines.append(f"lengths tokens, attention by document length: {_bins(bins)}")
    return lines + _work(stream, cost, sharder)


def _documents(corpus: Corpus, plan: Plan, named: str) -> str:
    held = len(corpus.documents("eval"))
    return f"data    {named}{len(corpus.store):,} documents, {held:,} held out; {plan}"


def by_length(plan: Plan, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """[2, 64]: tokens, and pairs of tokens that see each other, of documents of 2^i to 2^(i + 1)
    tokens; lengths: of all documents of the store."""
    bin_of = np.frexp(lengths[plan.document].astype(np.float64))[1] - 1
    tokens = plan.length.astype(np.float64)
    weights = (tokens, tokens * (tokens + 1) / 2)
    return np.stack([np.bincount(bin_of, weights=w, minlength=64)[:64] for w in weights])


def _bins(bins: NDArray[np.float64]) -> str:
    tokens, pairs = bins / bins.sum(1, keepdims=True)
    last = int(np.flatnonzero(tokens)[-1])
    first = min(int(np.searchsorted(np.cumsum(tokens), RARE)), last)
    parts = [f"{_size(i)} {tokens[i]:.0%}, {pairs[i]:.0%}" for i in range(first + 1, last + 1)]
    short = f"<{_size(first + 1)} {tokens[: first + 1].sum():.0%}, {pairs[: first + 1].sum():.0%}"
    return "; ".join([short, *parts])


def _size(power: int) -> str:
    """2^power."""
    return f"{2 ** (power % 10)}{('', 'k', 'M', 'G', 'T', 'P', 'E')[power // 10]}"


def _work(stream: TrainStream, cost: RowCost, sharder: Sharder | None) -> list[str]:
    """Expected of the steps to come, from a sample: the largest of the ranks over their mean."""
    lines = []
    if stream.ranks > 1:
        planned, balanced = np.mean(list(_imbalances(stream, cost)), axis=0)
        lines.append(
            f"work    of data ranks, max/mean: {planned:.3f} in the order of the plan, "
            f"{balanced:.3f} with data.balance=true"
        )
    if sharder is not None:
        reports = (layout.report() for layout in islice(_layouts(stream, sharder), SAMPLED_LAYOUTS))
        cut, uneven, fragments = np.mean(list(reports), axis=0)
        lines.append(
            f"work    of context ranks, max/mean: softmax area {uneven:.3f}; {cut:.1%} of tokens "
            f"in documents on several ranks, {fragments:.1f} fragments a rank"
        )
    return lines


def _imbalances(stream: TrainStream, cost: RowCost) -> Iterator[tuple[float, float]]:
    """Of steps, in the order of the plan and balanced."""
    rows = 0
    for cursor in count(stream.cursor):
        lengths, seq_len = _lengths(stream, cursor)
        costs = cost.of_rows(lengths, seq_len)
        order = spread(costs, ranks=stream.ranks, size=stream.micro_batch_size)
        yield (
            imbalance(costs, ranks=stream.ranks),
            imbalance([costs[i] for i in order], ranks=stream.ranks),
        )
        rows += len(costs)
        if rows >= SAMPLED_ROWS:
            return


def _layouts(stream: TrainStream, sharder: Sharder) -> Iterator[TokenLayout]:
    """Of micro-batches."""
    size = stream.micro_batch_size
    for cursor in count(stream.cursor):
        lengths, seq_len = _lengths(stream, cursor)
        for first in range(0, len(lengths), size):
            rows = lengths[first : first + size]
            padding = [seq_len - sum(row) for row in rows]
            info = SequenceInfo.from_lengths(rows, padding=padding)
            yield sharder.plan_documents(one_sequence(info))


def _lengths(stream: TrainStream, cursor: int) -> tuple[list[list[int]], int]:
    """(lengths of the documents in each row of a step, seq_len)."""
    steps = stream.data.steps
    seq_len = steps.stage(cursor).seq_len
    return stream.data.lengths(stream.data.locate(steps.rows(cursor), seq_len), seq_len), seq_len
