"""Which context rank holds which tokens of a packed batch: one layout for all layers of the model.

Planned on the host from the lengths of documents alone, so that every rank finds the same layout
without a message. The unit of work is that of causal attention inside documents: a token at
position p costs p + 1, and a run of tokens the sum of that, its area.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.sequence import Fragment, SequenceInfo
from parallel.balance import balance

Strategy = Literal["balanced", "zigzag", "contiguous"]
Rows = list[list[Fragment]]  # by rank


class LayoutReport(NamedTuple):
    cut: float  # share of the tokens whose document lies on more than one rank
    imbalance: float  # softmax area, largest over mean of the ranks
    fragments: float  # of documents, mean of the ranks


@dataclass(frozen=True)
class TokenLayout:
    """The row of every context rank, as fragments from left to right; all rows equally long.

    Padding lies behind the last token of the packed sequence. Raises ValueError for unequal rows.
    """

    ranks: tuple[tuple[Fragment, ...], ...]

    def __post_init__(self) -> None:
        lengths = {sum(fragment.length for fragment in row) for row in self.ranks}
        if len(lengths) != 1:
            raise ValueError(f"ranks must hold equally many tokens, got {sorted(lengths)}")

    def info(self, rank: int, device: torch.device | str = "cpu") -> SequenceInfo:
        return SequenceInfo.from_fragments([self.ranks[rank]], device, peers=self.ranks)

    def index(self, rank: int) -> NDArray[np.int64]:
        """[seq]: where this rank's tokens are in the packed sequence; -1 for padding."""
        runs = [
            np.full(f.length, -1) if f.padding else np.arange(f.index, f.index + f.length)
            for f in self.ranks[rank]
        ]
        return np.concatenate(runs)

    def report(self, *, causal: bool = True) -> LayoutReport:
        """causal: whether the area is that of causal attention."""
        rows = [[f for f in row if not f.padding] for row in self.ranks]
        homes: dict[int, set[int]] = {}
        for rank, row in enumerate(rows):
            for fragment in row:
                homes.setdefault(fragment.start, set()).add(rank)
        lengths = [(f.length, len(homes[f.start]) > 1) for row in rows for f in row]
        tokens = sum(length for length, _ in lengths)
        areas = [sum(map(area, row)) for row in rows] if causal else _square_areas(rows)
        return LayoutReport(
            cut=sum(length for length, is_cut in lengths if is_cut) / max(tokens, 1),
            imbalance=max(areas) * len(areas) / sum(areas) if tokens else 1.0,
            fragments=len(lengths) / len(rows),
        )


def area(fragment: Fragment) -> int:
    """Pairs of a token of the fragment and a token that it sees, itself included."""
    length = fragment.length
    return length * fragment.position + length * (length + 1) // 2


def _square_areas(rows: Rows) -> list[int]:
    """By rank, pairs of a token of the row and a token of the same document, on any rank."""
    documents: Counter[int] = Counter()
    for fragment in chain(*rows):
        documents[fragment.start] += fragment.length
    return [sum(f.length * documents[f.start] for f in row) for row in rows]


def plan_layout(
    documents: Sequence[Fragment],
    *,
    ranks: int,
    strategy: Strategy = "balanced",
    multiple: int = 1,
) -> TokenLayout:
    """Distributes whole documents and padding, which tile a packed sequence, over the ranks.

    balanced: see `parallel.balance`. zigzag: the sequence in 2 x ranks equal chunks, of which a
    rank holds one from either end. contiguous: equal chunks in order. A document is cut only where
    a multiple of `multiple` tokens precedes the cut; rows hold a multiple of it. Padding is dropped
    and each row padded anew, to the mean of the ranks if cuts may be anywhere, else to little more.

    Raises ValueError for an unknown strategy, and for ranks or multiple below 1.
    """
    for name, value in (("ranks", ranks), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 or more")
    if strategy not in _STRATEGIES:
        raise ValueError(f"layout is {strategy}; allowed: {', '.join(_STRATEGIES)}")
    total = sum(document.length for document in documents)
    rows = _STRATEGIES[strategy](documents, ranks, multiple)
    rows = [_joined([f for f in row if not f.padding]) for row in rows]
    filled = [sum(fragment.length for fragment in row) for row in rows]
    size = max(-(-total // ranks), *filled)
    return TokenLayout(_padded(rows, filled, size + -size % multiple, total))


def _contiguous(documents: Sequence[Fragment], ranks: int, multiple: int) -> Rows:
    return _chunks(documents, ranks, multiple)


def _zigzag(documents: Sequence[Fragment], ranks: int, multiple: int) -> Rows:
    chunks = _chunks(documents, 2 * ranks, multiple)
    return [chunks[i] + chunks[-1 - i] for i in range(ranks)]


def _balanced(documents: Sequence[Fragment], ranks: int, multiple: int) -> Rows:
    room = sum(document.length for document in documents)
    return balance([d for d in documents if not d.padding], room, ranks, multiple)


_STRATEGIES: dict[str, Callable[[Sequence[Fragment], int, int], Rows]] = {
    "balanced": _balanced,
    "zigzag": _zigzag,
    "contiguous": _contiguous,
}


def _chunks(documents: Sequence[Fragment], count: int, multiple: int) -> Rows:
    """The packed sequence in `count` chunks; a cut moves back to where the document allows one."""
    total = sum(document.length for document in documents)
    size = -(-total // count)
    chunks: Rows = [[] for _ in range(count)]
    chunk, filled = 0, 0  # tokens before the next one
    for document in documents:
        done = 0
        while done < document.length:
            wanted = (chunk + 1) * size - filled  # position of the end of the chunk
            last = document.length <= wanted
            end = document.length if last else max(done, wanted - wanted % multiple)
            if end > done:
                chunks[chunk].append(
                    replace(document, length=end - done, index=document.index + done, position=done)
                )
            done = end
            chunk += not last
        filled += document.length
    return chunks


def _joined(row: list[Fragment]) -> list[Fragment]:
    """In order of index, neighbours in one document as one fragment."""
    joined: list[Fragment] = []
    for fragment in sorted(row, key=lambda f: f.index):
        before = joined[-1] if joined else None
        if (
            before is not None
            and before.start == fragment.start
            and before.index + before.length == fragment.index
        ):
            joined[-1] = replace(before, length=before.length + fragment.length)
        else:
            joined.append(fragment)
    return joined


def _padded(rows: Rows, filled: list[int], size: int, end: int) -> tuple[tuple[Fragment, ...], ...]:
    """Every row padded to `size`; the indices of padding go on from `end`, rank by rank."""
    padded = []
    for row, tokens in zip(rows, filled, strict=True):
        missing = size - tokens
        padding = [Fragment(missing, end, padding=True)] if missing else []
        padded.append((*row, *padding))
        end += missing
    return tuple(padded)
