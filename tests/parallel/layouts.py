"""Layouts built by hand, for checks of a scheme against the whole sequence on one rank."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from models.sequence import Fragment, Peers, SequenceInfo

Row = tuple[Fragment, ...]
Stretch = tuple[int, int]  # start and stop in the packed global sequence


def contiguous(ranks: int, n: int) -> list[list[Stretch]]:
    """The stretches of n tokens in all that each rank holds, in its own order."""
    return [[(rank * n, (rank + 1) * n)] for rank in range(ranks)]


def zigzag(ranks: int, n: int) -> list[list[Stretch]]:
    half = n // 2
    pairs = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
    return [[(i * half, (i + 1) * half) for i in pair] for pair in pairs]


def scattered(ranks: int, n: int, seed: int = 0) -> list[list[Stretch]]:
    """Random stretches in random order."""
    draw = random.Random(seed)
    bounds = sorted({0, ranks * n, *draw.sample(range(1, ranks * n), 3 * ranks)})
    stretches = list(pairwise(bounds))
    draw.shuffle(stretches)
    held: list[list[Stretch]] = [[]]
    for start, stop in stretches:
        while start < stop:
            room = n - sum(b - a for a, b in held[-1])
            if room == 0:
                held.append([])
                continue
            held[-1].append((start, min(stop, start + room)))
            start += room
    return held


def place(lengths: Sequence[int], held: list[list[Stretch]]) -> Peers:
    """The fragments of each rank for documents of these lengths; what is left over is padding."""
    ends: list[int] = []
    padded = sum(b - a for stretches in held for a, b in stretches)
    for length in lengths:
        ends.append((ends[-1] if ends else 0) + length)
    assert not ends or ends[-1] <= padded

    def fragments(start: int, stop: int) -> Iterator[Fragment]:
        for first, end in zip([0, *ends], ends, strict=False):
            a, b = max(start, first), min(stop, end)
            if a < b:
                yield Fragment(b - a, a, a - first)
        a = max([start, *ends[-1:]])
        if a < stop:
            yield Fragment(stop - a, a, padding=True)

    return Peers(tuple(f for part in stretches for f in fragments(*part)) for stretches in held)


def whole(peers: tuple[Row, ...]) -> SequenceInfo:
    """All tokens on one rank, so that those of a rank are at its `info.index`."""
    return SequenceInfo.from_fragments(
        [sorted((f for row in peers for f in row), key=lambda f: f.index)]
    )


def local(x: Tensor, info: SequenceInfo) -> Tensor:
    """This rank's tokens of [1, all tokens, ...], as a leaf that takes gradients like x."""
    return x.detach()[:, info.index[0]].requires_grad_(x.requires_grad)


def document_lengths(ranks: int, n: int) -> dict[str, list[int]]:
    """Awkward packings of at most ranks x n tokens."""
    every = {
        "one": [ranks * n],
        "edges": [1, n - 1, n, n + 1, n],
        "three ranks": [2, 2 * n + 1],  # with four contiguous ranks the last is all padding
        "many": [3, 1, n + 1, 2, 1, n - 1, 5, 1, 1, n],
        "padding": [],
    }
    return {name: _first(lengths, ranks * n) for name, lengths in every.items()}


def _first(lengths: list[int], total: int) -> list[int]:
    """As many tokens of these documents as there are."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    cut = (min(x, total - start) for start, x in zip(starts, lengths, strict=True))
    return [length for length in cut if length > 0]


def cases(ranks: int) -> Iterator[tuple[str, Peers]]:
    for layout, n in ((contiguous, 7), (zigzag, 6), (scattered, 11)):
        for name, lengths in document_lengths(ranks, n).items():
            yield f"{layout.__name__} {name}", place(lengths, layout(ranks, n))


def rank_info(peers: tuple[Row, ...], rank: int) -> SequenceInfo:
    return SequenceInfo.from_fragments([peers[rank]], peers=peers)


def random_heads(peers: tuple[Row, ...], dims: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """A tensor [1, all tokens, *dims] each, that takes gradients."""
    total = sum(f.length for row in peers for f in row)
    generator = torch.Generator().manual_seed(total)
    drawn = (torch.randn(1, total, *d, generator=generator, dtype=torch.float64) for d in dims)
    return [x.requires_grad_() for x in drawn]
