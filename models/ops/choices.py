"""A choice between alternatives that a repeated forward pass takes again instead of making it anew.

Activation checkpointing computes a layer twice. Where the second pass sees rounded inputs, or runs
on kernels whose sums have no fixed order, near equals may come out the other way round: other
experts than those whose rows the first pass has laid out, and so wrong gradients without a word.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_take: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("choices", default=None)


# What is taken changes with every pass: nothing for a compiler to keep.
@torch.compiler.disable
def choose(indices: Tensor) -> Tensor:
    """`indices`, or those that stood in their place in the pass that this one repeats."""
    take = _take.get()
    return indices if take is None else take(indices)


class Choices:
    """Of one forward pass, in their order."""

    def __init__(self) -> None:
        self._made: list[Tensor] = []
        self._complete = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The first pass inside it makes the choices, every later one takes them again."""
        token = _take.set(self._repeat() if self._complete else self._record)
        try:
            yield
        finally:
            _take.reset(token)
            self._complete = True

    def _record(self, indices: Tensor) -> Tensor:
        self._made.append(indices)
        return indices

    def _repeat(self) -> Callable[[Tensor], Tensor]:
        made = iter(self._made)
        return lambda indices: next(made)
