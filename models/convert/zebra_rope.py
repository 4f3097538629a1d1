"""Partial rotation as Zebra-Llama starts it, arXiv 2505.17272.

The last channels of each head become the rotary ones, rotated as a rope of their own number, in
neighbouring pairs; the shared key is their mean over the key heads. No frequency is kept, so that
it is no approximation but a start for distillation; `select_rope` and `rorope` are far closer.
"""

import torch

from models.convert.forms import Attention, Decoupled


def zebra_rope(attention: Attention, rope_dim: int, frequencies: torch.Tensor) -> Decoupled:
    """frequencies: of a rope of rope_dim."""
    nope = attention.head_dim - rope_dim
    order = nope + torch.cat([torch.arange(0, rope_dim, 2), torch.arange(1, rope_dim, 2)])
    query, key = attention.scaled_query(), attention.key
    return Decoupled(
        query_nope=query[:, :nope],
        query_rope=query[:, order],
        key_nope=key[:, :nope],
        key_rope=key[:, order].mean(0),
        value=attention.value,
        frequencies=frequencies,
        key_rank=key.shape[0] * attention.head_dim,
        # The published start compresses them with the others, at the cost of rank.
        beside=key[:, nope:].flatten(0, 1),
    )
