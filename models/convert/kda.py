"""Softmax attention into Kimi Delta Attention: queries, keys, values and output as they are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints.config import Config, target
from models.convert.converted import Converted
from models.convert.forms import repeat_heads
from models.convert.linear import Taps, read_source, rows, set_taps
from models.mixers.kda import KimiDeltaAttention


def to_kda(section: Config, tensors: Mapping[str, Tensor], taps: Taps) -> Converted:
    """section, tensors: of grouped-query attention, whose key heads are repeated."""
    attention, norm_eps, dropped = read_source(section, tensors)
    key, value = (repeat_heads(x, attention.group) for x in (attention.key, attention.value))

    @torch.no_grad()
    def fill(mixer: KimiDeltaAttention) -> None:
        mixer.qkv_proj.weight.copy_(torch.cat([rows(x) for x in (attention.query, key, value)]))
        mixer.out_proj.weight.copy_(attention.out)
        set_taps(mixer.conv_weight, taps)

    made = {
        "_target_": target(KimiDeltaAttention),
        "_partial_": True,
        "num_heads": len(attention.query),
        "head_dim": attention.head_dim,
        "norm_eps": norm_eps,
    }
    return Converted(made, fill, dropped=dropped)
