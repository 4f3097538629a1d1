"""Routers whose load is counted, and held near a target by a bias instead of by a loss.

Auxiliary-loss-free balancing, arXiv 2408.15664: a loss for the load would need a weight against
that of the language model, and would pull at the gradients of everything below the router.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from models.precision import Island


class BalancedRouter(Island):
    """`bias` corrects choices only and is not trained; `counts` is the load since it was last
    taken."""

    bias: Tensor
    counts: Tensor

    def __init__(self, *, biases: int, counts: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(biases))
        self.register_buffer("counts", torch.zeros(counts, dtype=torch.int64), False)

    @abstractmethod
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """Moves the bias; counts are those of the whole step, over all ranks. rate: by how much,
        where the counts do not tell."""


def count_in_backward(x: Tensor, load: Tensor, counts: Tensor) -> Tensor:
    """The identity on x; its backward adds `load` to `counts`.

    A backward runs once per micro-batch, also when activation checkpointing runs the forward
    twice, and never in evaluation: just when a choice is to be counted.
    """
    return _Count.apply(x, load, counts)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, load: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(load)
        ctx.counts = counts
        return x.clone()  # no view: an engine puts hooks on what a layer returns

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (load,) = ctx.saved_tensors
        ctx.counts.add_(load)
        return grad, None, None
