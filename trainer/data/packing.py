"""Which row each piece goes into, and how documents become pieces.

Best-fit packing without truncation, arXiv 2404.10830, and concat-and-split, where documents lie one
behind the other and are cut where a row ends. Everything is vectorised over pieces of one length.
"""

import bisect
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.integer]


class Pieces(NamedTuple):
    """[pieces] each; `owner` indexes the documents, of which no two pieces share a token."""

    owner: Array
    start: Array  # of the first token, inside the document
    length: Array
    row: Array


def pack_best_fit(lengths: Array, seq_len: int) -> Pieces:
    """Documents [n] above seq_len are cut every seq_len tokens, the others stay whole."""
    owner, start, length = cut(lengths, seq_len)
    return Pieces(owner, start, length, best_fit(length, seq_len))


def pack_concat(lengths: Array, seq_len: int) -> Pieces:
    """Rows are full, but for the last; whatever lies across the end of a row is cut there."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    first = starts // seq_len
    counts = (ends - 1) // seq_len - first + 1
    owner, within = _expand(counts)
    row = first[owner] + within
    start = np.maximum(starts[owner], row * seq_len)
    length = np.minimum(ends[owner], (row + 1) * seq_len) - start
    return Pieces(owner, start - starts[owner], length, row)


def cut(lengths: Array, seq_len: int) -> tuple[Array, Array, Array]:
    """(owner, start, length) of pieces of at most seq_len tokens; owner indexes `lengths`."""
    owner, within = _expand(-(-lengths // seq_len))
    start = within * seq_len
    return owner, start, np.minimum(seq_len, lengths[owner] - start)


def _expand(counts: Array) -> tuple[Array, Array]:
    """(owner, place among the owner's pieces) of counts[i] pieces of each owner i."""
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner))
    within -= np.repeat(np.cumsum(counts) - counts, counts)
    return owner, within


class _OpenRows:
    """Rows that still have room, by how much."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending
        self._rows: dict[int, list[Array]] = defaultdict(list)

    def put(self, room: int, rows: Array) -> None:
        if room and len(rows):
            if room not in self._rows:
                bisect.insort(self._rooms, room)
            self._rows[room].append(rows)

    def tightest(self, size: int) -> int | None:
        """The smallest room that is at least `size`."""
        i = bisect.bisect_left(self._rooms, size)
        return self._rooms[i] if i < len(self._rooms) else None

    def take(self, room: int, count: int) -> Array:
        """At most `count` rows of one room."""
        rows = self._rows[room].pop()
        if len(rows) > count:
            self._rows[room].append(rows[count:])
        if not self._rows[room]:
            del self._rows[room], self._rooms[bisect.bisect_left(self._rooms, room)]
        return rows[:count]


def best_fit(lengths: Array, capacity: int) -> Array:
    """[pieces] -> the row of each: longest piece first, each into the row it fills best.

    Pieces of one length and rows of equal room are placed together. The tightest row takes
    room // size pieces in turn and keeps room % size < room / 2, so a group of rows moves at most
    log2(capacity) times: the Python loop runs over lengths that differ, not over pieces.
    """
    row_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    open_rows, rows, placed = _OpenRows(), 0, 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = placed + count
        while placed < end:
            room = open_rows.tightest(size)
            fit = (room or capacity) // size
            wanted = -(-(end - placed) // fit)
            if room is None:
                room, taken = capacity, np.arange(rows, rows + wanted)
                rows += wanted
            else:
                taken = open_rows.take(room, wanted)
            now = min(end - placed, fit * len(taken))
            row_of[order[placed : placed + now]] = np.repeat(taken, fit)[:now]
            full, rest = divmod(now, fit)
            open_rows.put(room - fit * size, taken[:full])
            open_rows.put(room - rest * size, taken[full:])
            placed += now
    return row_of
