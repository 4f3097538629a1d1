"""What the ways from softmax attention to linear mixers share.

The map is MambaInLlama's (arXiv 2408.15237): without its softmax, attention is a state that each
key writes its value to and each query reads. Gates, decays and norms keep their initial values,
so that this is a start for distillation.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.checkpoints.config import Config, settings_of
from models.convert.forms import Attention
from models.convert.source import read_attention
from models.mixers.gqa import GroupedQueryAttention

Taps = Literal["identity", "initial"]  # of the convolution: only the token itself, or as drawn


class Source(NamedTuple):
    attention: Attention
    norm_eps: float
    dropped: tuple[str, ...]


def read_source(section: Config, tensors: Mapping[str, Tensor]) -> Source:
    """See `read_attention`."""
    settings = settings_of(section, GroupedQueryAttention)
    attention = read_attention(section, tensors)
    has = {
        "positions": bool(attention.frequencies.any()),
        "biases": attention.biased,
        "norms of queries and keys": settings["qk_norm"],
        "output gate": settings["output_gate"],
    }
    dropped = tuple(name for name, present in has.items() if present)
    return Source(attention, settings["norm_eps"], dropped)


def rows(maps: Tensor) -> Tensor:
    """[heads, rows, d_model + 1] -> the weight [heads rows, d_model], without biases."""
    return maps[..., :-1].flatten(0, 1)


@torch.no_grad()
def set_taps(weight: Tensor, taps: Taps) -> None:
    """[channels, width], newest tap last."""
    if taps == "identity":
        weight.zero_()[:, -1] = 1
