"""Activation checkpointing, arXiv 1604.06174: keep the input of a block, recompute the rest."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(layers: nn.ModuleList) -> None:
    """Replaces the forward of every layer, in place: no wrapper, so all names stay as they were."""
    for layer in layers:
        # Nothing in a block draws random numbers, so there is no generator to restore.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
