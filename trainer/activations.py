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

# Linear, or a smooth function of single tokens: gradients get wrong by about what was rounded away.
# In kimi_linear (1,024 tokens, fp32) int8 leaves 63 % of the memory and an error of 0.05 % of the
# gradient, 0.14 % of the median parameter's. Rounding all that a layer saves would leave 27 %, with
# 0.36 % and 1.2 %, for attention and recurrences take exponentials of differences of what they
# saved. What is not listed stays exact: those, gates, decays, routers, and whatever comes to be.
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
