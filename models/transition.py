"""Transitions of linear recurrences: how a segment maps the state that enters it, S -> T S.

Each kind travels in its own size: a dense one is a matrix per head, a diagonal one a vector, a
scalar one a number. Composition is associative and not commutative.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Transition(Protocol):
    """[batch, heads, ...] linear maps on states [batch, heads, key_dim, value_dim]."""

    @property
    def tensor(self) -> Tensor:
        """What a message must carry."""
        ...

    def apply(self, state: Tensor) -> Tensor:
        """T S."""
        ...

    def adjoint(self, grad: Tensor) -> Tensor:
        """T^T G: the gradient of the state that entered, from that of the state that left."""
        ...

    def compose(self, earlier: Self) -> Self:
        """The map that first does `earlier`, then this."""
        ...


@dataclass(frozen=True, eq=False)
class DenseTransition:
    """tensor: [batch, heads, key_dim, key_dim]; the delta rule."""

    tensor: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return self.tensor @ state

    def adjoint(self, grad: Tensor) -> Tensor:
        return self.tensor.mT @ grad

    def compose(self, earlier: "DenseTransition") -> "DenseTransition":
        return DenseTransition(self.tensor @ earlier.tensor)


@dataclass(frozen=True, eq=False)
class DiagonalTransition:
    """tensor: [batch, heads, key_dim], or [batch, heads, 1] for one decay per head."""

    tensor: Tensor

    def apply(self, state: Tensor) -> Tensor:
        return self.tensor.unsqueeze(-1) * state

    adjoint = apply

    def compose(self, earlier: "DiagonalTransition") -> "DiagonalTransition":
        return DiagonalTransition(torch.mul(self.tensor, earlier.tensor))
