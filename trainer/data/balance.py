"""Rows of a step over ranks and micro-batches, so that all have equal work.

Which rows a step has never changes; who takes which is a pure function of their costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """FLOPs of a model on a row: `token` for each of its positions, padding too, and `pair` for
    each token and one that it sees."""

    token: float
    pair: float

    def of_rows(self, lengths: Sequence[Sequence[int]], seq_len: int) -> list[float]:
        """lengths: of the documents in each row."""
        pairs = (sum(n * (n + 1) // 2 for n in row) for row in lengths)
        return [self.token * seq_len + self.pair * seen for seen in pairs]


def spread(costs: Sequence[float], *, ranks: int, size: int) -> list[int]:
    """An order of the rows in which rank r has the r-th of `ranks` equal shares, and each share is
    micro-batches of `size` rows.

    Micro-batches get rows of even cost, longest first into the cheapest with room. Those that ranks
    work on at one time are neighbours in cost, as ranks may wait for each other in each of them;
    the dearest of them goes to the rank that has the least so far.
    """
    count = len(costs) // size
    parts: list[list[int]] = [[] for _ in range(count)]
    filled = [0.0] * count
    cheapest_first = [(0.0, part) for part in range(count)]  # a heap of those with room
    for row in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        _, part = heappop(cheapest_first)
        parts[part].append(row)
        filled[part] += costs[row]
        if len(parts[part]) < size:
            heappush(cheapest_first, (filled[part], part))
    dearest = sorted(range(count), key=lambda p: (-filled[p], p))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    work = [0.0] * ranks
    for first in range(0, count, ranks):
        cheapest = sorted(range(ranks), key=lambda r: (work[r], r))
        for rank, part in zip(cheapest, dearest[first : first + ranks], strict=True):
            shares[rank] += parts[part]
            work[rank] += filled[part]
    return [row for share in shares for row in share]


def imbalance(costs: Sequence[float], *, ranks: int) -> float:
    """Of rows in the order of their shares: cost of a rank, largest over mean."""
    share = len(costs) // ranks
    work = [sum(costs[rank * share : (rank + 1) * share]) for rank in range(ranks)]
    return max(work) * ranks / sum(work)
