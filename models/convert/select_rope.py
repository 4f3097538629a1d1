"""Partial rotation by selection: some frequency pairs of each key head stay rotary, the others
lose their rotation. MHA2MLA, arXiv 2502.14837.

The kept pairs are exact. The shared rotary key holds those of all key heads side by side; a query
head reads those of its own, and the rest of it meets zeros.
"""

from typing import Literal

import torch
from torch import Tensor

from models.convert.forms import Attention, Decoupled, repeat_heads
from models.convert.low_rank import power

Pairs = Literal["high", "low", "uniform", "norm"]


def select_rope(
    attention: Attention, rope_dim: int, choice: Pairs, moment: Tensor | None
) -> Decoupled:
    """Keeps rope_dim / 2 pairs of each of N key heads: the shared key has N rope_dim channels.

    choice: the highest or the lowest frequencies, evenly spread ones, or by head those pairs whose
    queries and keys are longest by `moment`, see `factorise`.
    """
    query, count, key_heads = attention.scaled_query(), rope_dim // 2, attention.key.shape[0]
    kept = choose_pairs(attention, count, choice, moment)
    left = _others(kept, attention.head_dim // 2)
    read = repeat_heads(torch.arange(key_heads), attention.group)  # by each query head
    query_rope = query.new_zeros(len(query), 2, key_heads, count, query.shape[-1])
    turning = _take(query, kept[read]).unflatten(1, (2, count))
    query_rope[torch.arange(len(query)), :, read] = turning
    key_rope = _take(attention.key, kept).unflatten(1, (2, count)).transpose(0, 1)
    return Decoupled(
        query_nope=_take(query, left[read]),
        query_rope=query_rope.flatten(1, 3),
        key_nope=_take(attention.key, left),
        key_rope=key_rope.flatten(0, 2),
        value=attention.value,
        frequencies=attention.frequencies[kept].flatten(),
        key_rank=key_heads * (attention.head_dim - rope_dim),
    )


def choose_pairs(attention: Attention, count: int, choice: Pairs, moment: Tensor | None) -> Tensor:
    """[N, count]: the pairs that each key head keeps, ascending."""
    total, key_heads = attention.head_dim // 2, attention.key.shape[0]
    if choice == "norm":
        both = attention.query, repeat_heads(attention.key, attention.group)
        query, key = (power(maps, moment).unflatten(1, (2, total)).sum(1) for maps in both)
        contribution = (query * key).sqrt().unflatten(0, (key_heads, attention.group)).sum(1)
        return contribution.topk(count).indices.sort().values
    chosen = {
        "high": torch.arange(count),
        "low": torch.arange(total - count, total),
        "uniform": torch.arange(count) * total // count,
    }[choice]
    return chosen.expand(key_heads, -1)


def _others(kept: Tensor, total: int) -> Tensor:
    """[N, total - count], ascending."""
    left = kept.new_ones(len(kept), total, dtype=torch.bool).scatter(1, kept, False)
    return left.nonzero()[:, 1].view(len(kept), -1)


def _take(maps: Tensor, chosen: Tensor) -> Tensor:
    """[heads, D, d_model + 1] and pairs [heads, count] -> [heads, 2 count, d_model + 1]."""
    channels = torch.cat([chosen, chosen + maps.shape[1] // 2], dim=1)
    return maps[torch.arange(len(maps))[:, None], channels]
