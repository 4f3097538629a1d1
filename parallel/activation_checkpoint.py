"""Activation checkpointing, arXiv 1604.06174: keep the input of a block, recompute the rest."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.ops.choices import Choices

Stream = tuple[Tensor, ...]


def apply_activation_checkpointing(layers: nn.ModuleList) -> None:
    """Replaces the forward of every layer, in place: no wrapper, so all names stay as they were.

    Layers take a tuple of tensors, the stream, and what has no gradient. Each tensor of the stream
    is a saved tensor for the hooks of autograd.
    """
    for layer in layers:
        layer.forward = partial(checkpointed, layer.forward)


def checkpointed(forward: Callable[..., Stream], stream: Stream, *rest: Any) -> Stream:
    """`forward(stream, *rest)`, of which the inputs alone wait for the backward pass."""
    choices = Choices()

    def run(*stream: Tensor) -> Stream:
        with choices.kept():
            return forward(stream, *rest)

    # Nothing in a block draws random numbers, so there is no generator to restore.
    return checkpoint(run, *stream, use_reentrant=False, preserve_rng_state=False)
