"""Packing plan of one epoch: which piece of which document lies in which row.

A plan is a pure function of the document lengths, the seed, the epoch and the row length, so any
rank can tell what any other reads.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import Array, Pieces, pack_best_fit, pack_concat

Packing = Literal["best_fit", "concat"]
Overlong = Literal["split", "drop"]

PACKERS: dict[str, Callable[[Array, int], Pieces]] = {
    "best_fit": pack_best_fit,
    "concat": pack_concat,
}


class Piece(NamedTuple):
    document: int
    start: int  # of the first token, inside the document
    length: int


@dataclass(frozen=True, kw_only=True)
class LongDocuments:
    """Documents of more than `above` tokens come `repeat` times an epoch; null: none does."""

    above: int | None = None
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat is {self.repeat}; allowed: 1 or more")
        if self.above is not None and self.above < 1:
            raise ValueError(f"above is {self.above}; allowed: 1 or more, or null")

    def times(self, lengths: Array) -> Array:
        """[documents]: how often each comes in an epoch."""
        if self.above is None:
            return np.ones(len(lengths), np.int64)
        return np.where(lengths > self.above, self.repeat, 1)


@dataclass(frozen=True, eq=False)
class Plan:
    """Pieces in the order of rows; row i holds pieces bounds[i] to bounds[i + 1].

    Of the documents counted, each copy counts.
    """

    seq_len: int
    document: Array  # [pieces]
    start: Array  # [pieces]
    length: Array  # [pieces]
    bounds: Array  # [rows + 1]
    documents: int
    cut_documents: int
    cut_tokens: int  # in those
    dropped_documents: int
    dropped_tokens: int

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @property
    def padding_share(self) -> float:
        """Of all tokens in rows."""
        return 1 - self.tokens / max(1, self.rows * self.seq_len)

    @cached_property
    def hash(self) -> str:
        digest = hashlib.sha256(str(self.seq_len).encode())
        for values in (self.document, self.start, self.length, self.bounds):
            digest.update(values.astype("<i8").tobytes())  # however they are kept
        return digest.hexdigest()

    def row(self, row: int) -> list[Piece]:
        part = slice(self.bounds[row], self.bounds[row + 1])
        columns = (values[part].tolist() for values in (self.document, self.start, self.length))
        return list(map(Piece, *columns))

    def __str__(self) -> str:
        text = (
            f"{self.rows:,} rows of {self.seq_len:,} tokens, {self.padding_share:.2%} padding, "
            f"{self.cut_documents:,} of {self.documents:,} documents cut "
            f"({self.cut_tokens / max(1, self.tokens):.1%} of tokens)"
        )
        if not self.dropped_documents:
            return text
        share = self.dropped_tokens / (self.tokens + self.dropped_tokens)
        return f"{text}, {self.dropped_documents:,} dropped ({share:.1%} of all tokens)"


def make_plan(
    documents: Array,
    lengths: Array,
    *,
    seq_len: int,
    packing: Packing = "best_fit",
    overlong: Overlong = "split",
    long_documents: LongDocuments | None = None,
    shuffle: tuple[int, int] | None = None,
) -> Plan:
    """Packs documents [n] of lengths [n] into rows of seq_len tokens.

    packing: see `trainer.data.packing`; overlong: a document above seq_len is cut ("split") or left
    out ("drop"); shuffle: (seed, epoch) that order documents and rows; None keeps the given order.
    """
    dropped = lengths > seq_len if overlong == "drop" else np.zeros(len(lengths), np.bool_)
    lost = int(dropped.sum()), int(lengths[dropped].sum())
    kept, kept_lengths = documents[~dropped], lengths[~dropped]
    if long_documents is not None and long_documents.above is not None:
        times = long_documents.times(kept_lengths)
        kept, kept_lengths = np.repeat(kept, times), np.repeat(kept_lengths, times)
    if shuffle is not None:
        order = permutation(len(kept), (*shuffle, 0))
        kept, kept_lengths = kept[order], kept_lengths[order]
        del order
    owner, start, length, row = PACKERS[packing](kept_lengths, seq_len)
    is_cut = np.bincount(owner, minlength=len(kept)) > 1
    pieces_of_row = np.bincount(row)
    if shuffle is not None:
        place = permutation(len(pieces_of_row), (*shuffle, 1))
        row = place[row]
        pieces_of_row[place] = pieces_of_row.copy()
    by_row = np.argsort(row, kind="stable")
    del row
    return Plan(
        seq_len=seq_len,
        document=narrow(kept[owner[by_row]]),
        start=narrow(start[by_row]),
        length=narrow(length[by_row]),
        bounds=np.concatenate([[0], np.cumsum(pieces_of_row)]),
        documents=len(kept),
        cut_documents=int(is_cut.sum()),
        cut_tokens=int(kept_lengths[is_cut].sum()),
        dropped_documents=lost[0],
        dropped_tokens=lost[1],
    )


def permutation(count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """A random order of `count` things.

    Made from raw generator output: numpy keeps that stable over versions, unlike its shuffles.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable")


def narrow(values: Array) -> Array:
    """The same in four bytes each, if they fit."""
    fits = not len(values) or int(values.max()) < 2**31
    return values.astype(np.int32) if fits else values
