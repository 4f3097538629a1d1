"""How the activations of a layer wait for its backward pass: what may be rounded, and where."""

from collections.abc import Iterable

import torch
from torch import nn

from models.ffn import SwiGLU
from models.norm import RMSNorm
from models.ops.experts import GroupedExperts, GroupedMatmulExperts
from models.sequence import CausalConv
from parallel.activation_storage import apply_activation_storage
from parallel.offload import Offload
from trainer.errors import ConfigError
from trainer.settings import Settings

# Each is a smooth function of single tokens, or linear: what it saved wrongly by a percent makes
# its own gradients wrong by about as much. Rounding all that a layer saves takes half the memory
# again, but makes gradients through attention and recurrences up to a hundred times their size:
# those hold exponentials of differences against saved sums. A module that is not in this list is
# exact: attention, recurrences, gates, decays, routers, and whatever comes to be added.
ROUNDED = (nn.Linear, RMSNorm, SwiGLU, GroupedExperts, GroupedMatmulExperts, CausalConv)


def store_activations(
    layers: Iterable[nn.Module], settings: Settings, device: torch.device
) -> None:
    """In place; behind compilation and checkpointing, if any. Raises ConfigError.

    A checkpointed layer keeps its input alone. Where that is rounded, all the rest is computed
    again from the rounded input, as exactly as before.
    """
    if settings.activation_offload and device.type != "cuda":
        raise ConfigError(
            f"trainer.activation_offload=true: the run is on {device.type}; allowed on cuda"
        )
    apply_activation_storage(
        layers,
        rounding=settings.rounding,
        rounded=None if settings.activation_checkpointing else ROUNDED,
        offload=Offload(device) if settings.activation_offload else None,
    )
