"""Activation checkpointing, arXiv 1604.06174: keep the input of a block, recompute the rest."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def apply_activation_checkpointing(layers: nn.ModuleList) -> None:
    """Wraps every layer in place; names of parameters and keys of the state stay as they were."""
    for i, layer in enumerate(layers):
        # Nothing in a block draws random numbers, so there is no generator to restore.
        layers[i] = checkpoint_wrapper(layer, preserve_rng_state=False)
