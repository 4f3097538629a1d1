"""Softmax attention into Mamba-2, as Zebra-Llama starts it (arXiv 2505.17272): x from the values,
B from the keys, C from the queries."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints.config import Config, target
from models.convert.converted import Converted
from models.convert.linear import Taps, read_source, rows, set_taps
from models.mixers.mamba2 import Mamba2


def to_mamba2(section: Config, tensors: Mapping[str, Tensor], taps: Taps) -> Converted:
    """section, tensors: of grouped-query attention; x and B keep its number of key heads."""
    attention, norm_eps, dropped = read_source(section, tensors)
    heads, head_dim = len(attention.query), attention.head_dim

    @torch.no_grad()
    def fill(mixer: Mamba2) -> None:
        _, mixed, _ = mixer.in_proj.weight.split(mixer.in_widths)
        maps = (attention.value, attention.key, attention.query)
        mixed.copy_(torch.cat([rows(x) for x in maps]))
        mixer.out_proj.weight.copy_(attention.out)
        set_taps(mixer.conv_weight, taps)

    made = {
        "_target_": target(Mamba2),
        "_partial_": True,
        "num_heads": heads,
        "head_dim": head_dim,
        "state_dim": head_dim,
        "num_groups": heads,
        "num_kv_heads": len(attention.key),
        "norm_eps": norm_eps,
    }
    return Converted(made, fill, dropped=dropped)
