"""Packing plan of one epoch: which piece of which document lies in which row.

Best-fit packing without truncation, arXiv 2404.10830. A plan is a pure function of the document
lengths, the seed, the epoch and the row length, so any rank can tell what any other reads.
"""

import bisect
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]


class Piece(NamedTuple):
    document: int
    start: int  # of the first token, inside the document
    length: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Pieces in the order of rows; row i holds pieces bounds[i] to bounds[i + 1]."""

    seq_len: int
    document: Array  # [pieces]
    start: Array  # [pieces]
    length: Array  # [pieces]
    bounds: Array  # [rows + 1]
    split_documents: int
    dropped_documents: int
    dropped_tokens: int

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def tokens(self) -> int:
        return int(self.length.sum())

    @property
    def padding_share(self) -> float:
        """Of all tokens in rows."""
        return 1 - self.tokens / max(1, self.rows * self.seq_len)

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(str(self.seq_len).encode())
        for values in (self.document, self.start, self.length, self.bounds):
            digest.update(values.tobytes())
        return digest.hexdigest()

    def row(self, row: int) -> list[Piece]:
        part = slice(self.bounds[row], self.bounds[row + 1])
        columns = (values[part].tolist() for values in (self.document, self.start, self.length))
        return list(map(Piece, *columns))

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows of {self.seq_len:,} tokens, {self.padding_share:.2%} padding, "
            f"{self.split_documents:,} documents split, {self.dropped_documents:,} dropped "
            f"({self.dropped_tokens:,} tokens)"
        )


def make_plan(
    documents: Array,
    lengths: Array,
    *,
    seq_len: int,
    overlong: str = "split",
    shuffle: tuple[int, int] | None = None,
) -> Plan:
    """Packs documents [n] of lengths [n] into rows of seq_len tokens.

    overlong: a document above seq_len is cut every seq_len tokens ("split") or left out ("drop").
    shuffle: (seed, epoch) that order documents and rows; None keeps the given order.
    """
    long = lengths > seq_len
    dropped = long if overlong == "drop" else np.zeros_like(long)
    kept_documents, kept_lengths = documents[~dropped], lengths[~dropped]
    if shuffle is not None:
        order = permutation(len(kept_documents), (*shuffle, 0))
        kept_documents, kept_lengths = kept_documents[order], kept_lengths[order]
    owner, start, length = cut(kept_lengths, seq_len)
    row = best_fit(length, seq_len)
    pieces_of_row = np.bincount(row)
    if shuffle is not None:
        place = permutation(len(pieces_of_row), (*shuffle, 1))
        row = place[row]
        pieces_of_row[place] = pieces_of_row.copy()
    by_row = np.argsort(row, kind="stable")
    return Plan(
        seq_len=seq_len,
        document=kept_documents[owner[by_row]],
        start=start[by_row],
        length=length[by_row],
        bounds=np.concatenate([[0], np.cumsum(pieces_of_row)]),
        split_documents=int((long & ~dropped).sum()),
        dropped_documents=int(dropped.sum()),
        dropped_tokens=int(lengths[dropped].sum()),
    )


def permutation(count: int, key: tuple[int, ...]) -> Array:
    """A random order of `count` things.

    Made from raw generator output: numpy keeps that stable over versions, unlike its shuffles.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable")


def cut(lengths: Array, seq_len: int) -> tuple[Array, Array, Array]:
    """(owner, start, length) of pieces of at most seq_len tokens; owner indexes `lengths`."""
    counts = -(-lengths // seq_len)
    owner = np.repeat(np.arange(len(lengths)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(owner)) - before) * seq_len
    return owner, start, np.minimum(seq_len, lengths[owner] - start)


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
