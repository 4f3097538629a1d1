"""Maps through a bottleneck: the best subspace for their outputs, by weights or by data."""

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """maps ~ up @ down."""

    up: Tensor  # [rows, rank], orthonormal columns
    down: Tensor  # [rank, d_model + 1]

    def product(self) -> Tensor:
        return self.up @ self.down


def factorise(maps: Tensor, rank: int, moment: Tensor | None) -> LowRank:
    """Keeps the `rank` principal directions of the outputs of `maps` [rows, d_model + 1].

    moment: [d_model + 1, d_model + 1], the mean of x x^T over inputs with a one behind them, which
    makes this the principal component analysis of the outputs; None for the singular value
    decomposition of the weights.
    """
    weighted = maps if moment is None else maps @ moment
    _, directions = torch.linalg.eigh(weighted @ maps.T)  # ascending
    up = directions[:, -rank:].flip(1)
    return LowRank(up, up.T @ maps)


def power(maps: Tensor, moment: Tensor | None) -> Tensor:
    """[..., rows, d_model + 1] -> [..., rows]: the mean square of each output."""
    weighted = maps if moment is None else maps @ moment
    return (weighted * maps).sum(-1)
