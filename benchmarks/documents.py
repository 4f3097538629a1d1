"""Packed documents for the masks of the Long-Context Attention Benchmark, arXiv 2510.17896.

Its document masks draw lengths from histograms of three corpora: the Pile, and ProLong at 64k and
512k. These are shapes like theirs, not their numbers: shares of the packed length, so that a
benchmark of any length has documents from those that lie on one rank to those that lie on all.
"""

from typing import Literal, NamedTuple

import numpy as np

Histogram = Literal["short", "medium", "long"]


class Bin(NamedTuple):
    """Lengths are log-uniform between two shares of the packed length."""

    weight: float  # of the documents, not of the tokens
    shortest: float
    longest: float


HISTOGRAMS: dict[Histogram, tuple[Bin, ...]] = {
    "short": (Bin(0.9, 1 / 512, 1 / 64), Bin(0.1, 1 / 64, 1 / 8)),
    "medium": (Bin(0.7, 1 / 256, 1 / 16), Bin(0.2, 1 / 16, 1 / 4), Bin(0.1, 1 / 4, 1 / 2)),
    "long": (Bin(0.5, 1 / 256, 1 / 8), Bin(0.3, 1 / 8, 1 / 2), Bin(0.2, 1 / 2, 1.0)),
}


def document_lengths(histogram: Histogram, total: int, *, seed: int) -> list[int]:
    """Positive lengths that sum to `total`; the last document is cut off there."""
    draw = np.random.default_rng(seed)
    bins = HISTOGRAMS[histogram]
    weights = [b.weight for b in bins]
    lengths: list[int] = []
    left = total
    while left:
        chosen = bins[draw.choice(len(bins), p=weights)]
        share = np.exp(draw.uniform(np.log(chosen.shortest), np.log(chosen.longest)))
        lengths.append(min(max(round(share * total), 1), left))
        left -= lengths[-1]
    return lengths
