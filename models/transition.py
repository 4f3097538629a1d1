"""Transitions of linear recurrences: how a segment maps the state that enters it, S -> T S.

Each kind travels in its own size: a dense one is a matrix per head, a diagonal one a vector, a
scalar one a number. Composition is associative and not commutative.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transition(ABC):
    """Linear maps on states [batch, heads, key_dim, value_dim]."""

    tensor: Tensor  # [batch, heads, *shape(key_dim)]: what a message must carry

    @staticmethod
    @abstractmethod
    def shape(key_dim: int) -> tuple[int, ...]:
        """Of one head's numbers: known to a receiver before they arrive."""

    @classmethod
    @abstractmethod
    def of_matrix(cls, matrix: Tensor) -> Self:
        """The map that is known to be of this kind, from its matrices [batch, heads, K, K]."""

    @abstractmethod
    def apply(self, state: Tensor) -> Tensor:
        """T S."""

    @abstractmethod
    def adjoint(self, grad: Tensor) -> Tensor:
        """T^T G: the gradient of the state that entered, from that of the state that left."""

    @abstractmethod
    def compose(self, earlier: Self) -> Self:
        """The map that first does `earlier`, then this."""


class DenseTransition(Transition):
    """A matrix per head; the delta rule."""

    @staticmethod
    def shape(key_dim: int) -> tuple[int, ...]:
        return key_dim, key_dim

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Self:
        return cls(matrix)

    def apply(self, state: Tensor) -> Tensor:
        return self.tensor @ state

    def adjoint(self, grad: Tensor) -> Tensor:
        return self.tensor.mT @ grad

    def compose(self, earlier: Self) -> Self:
        return type(self)(self.tensor @ earlier.tensor)


class DiagonalTransition(Transition):
    """A decay per key channel."""

    @staticmethod
    def shape(key_dim: int) -> tuple[int, ...]:
        return (key_dim,)

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Self:
        return cls(matrix.diagonal(dim1=-2, dim2=-1))

    def apply(self, state: Tensor) -> Tensor:
        return self.tensor.unsqueeze(-1) * state

    def adjoint(self, grad: Tensor) -> Tensor:
        return self.apply(grad)

    def compose(self, earlier: Self) -> Self:
        return type(self)(torch.mul(self.tensor, earlier.tensor))


class ScalarTransition(DiagonalTransition):
    """A decay per head."""

    @staticmethod
    def shape(key_dim: int) -> tuple[int, ...]:
        return (1,)

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Self:
        return cls(matrix[..., 0, :1])
