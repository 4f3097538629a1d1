"""A layer's attention as a conversion reads it: from its section of a config and its tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints.config import Config, settings_of, target
from models.convert.forms import Attention
from models.mixers.gqa import GroupedQueryAttention
from models.rope import ROPE_KEYS, Rope, make_rope


def is_attention(section: Config) -> bool:
    return section["_target_"] == target(GroupedQueryAttention)


def read_attention(section: Config, tensors: Mapping[str, Tensor]) -> Attention:
    """In fp64. section: of the mixer; tensors: by the names they have in it.

    Raises ValueError for options that scores over all earlier tokens do not have.
    """
    settings = settings_of(section, GroupedQueryAttention)
    if settings.get("window") is not None:
        raise ValueError(f"window is {settings['window']}; only attention without one is converted")
    heads, key_heads, dim = (settings[key] for key in ("num_heads", "num_kv_heads", "head_dim"))
    weight = tensors["qkv_proj.weight"].double()
    bias = tensors.get("qkv_proj.bias")
    column = weight.new_zeros(len(weight)) if bias is None else bias.double()
    maps = torch.cat([weight, column[:, None]], dim=1).unflatten(0, (-1, dim))
    query, key, value = maps.split([heads, key_heads, key_heads])
    magnitude = _magnitude(settings, dim)
    out = tensors["out_proj.weight"].double()
    out_bias = tensors.get("out_proj.bias")
    return Attention(
        query=query * magnitude,
        key=key * magnitude,
        value=value,
        out=out,
        out_bias=out.new_zeros(len(out)) if out_bias is None else out_bias.double(),
        frequencies=frequencies(settings, dim).to(weight.device),
        biased=bias is not None or out_bias is not None,
    )


def frequencies(keys: Config, dim: int) -> Tensor:
    """[dim / 2], radians a token, of a mixer's keys `rope_*`; 0 where it has no positions."""
    rope = _rope(keys, dim)
    zeros = torch.zeros(dim // 2, dtype=torch.float64)
    return zeros if rope is None else rope.radians(zeros)


def rope_keys(teacher: Config, turns: Tensor) -> Config:
    """Keys `rope_*` of a mixer whose pairs turn at `turns` [R / 2]: the teacher's, where these give
    the same and nothing else, else frequencies."""
    keys = {key: teacher[key] for key in ROPE_KEYS}
    dim = 2 * len(turns)
    if keys["rope_frequencies"] is None and _magnitude(keys, dim) == 1:
        own = frequencies(keys, dim).to(turns.device)
        if torch.allclose(own, turns, rtol=1e-12, atol=0):
            return keys
    return dict(zip(ROPE_KEYS, (None, 1.0, None, turns.tolist()), strict=True))


def _magnitude(keys: Config, dim: int) -> float:
    """Of what is rotated."""
    rope = _rope(keys, dim)
    return 1.0 if rope is None else rope.magnitude


def _rope(keys: Config, dim: int) -> Rope | None:
    if dim % 2:
        raise ValueError(f"head_dim is {dim}; only even ones are converted")
    base, factor, scaling, given = (keys[key] for key in ROPE_KEYS)
    return make_rope(dim, base=base, factor=factor, scaling=scaling, frequencies=given)
