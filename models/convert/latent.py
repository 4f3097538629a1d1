"""Softmax attention into multi-head latent attention: TransMLA (arXiv 2502.07864), MHA2MLA (arXiv
2502.14837) and Zebra-Llama (arXiv 2505.17272), which share all but their partial rotation.

The keys and values of all heads but for the rotary channels are compressed together into the
latent, and queries if asked for. At full sizes nothing changes.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoints.config import Config, settings_of, target
from models.convert.converted import Converted, Stage
from models.convert.forms import Attention, Decoupled, repeat_heads
from models.convert.low_rank import LowRank, factorise, power
from models.convert.options import LatentOptions, Size
from models.convert.partial_rope import part_rope
from models.convert.source import read_attention, rope_keys
from models.mixers.gqa import GroupedQueryAttention
from models.mixers.mla import MultiHeadLatentAttention


class Compressed(NamedTuple):
    """The products of the factors, and the factors."""

    form: Decoupled
    kv: LowRank  # to the nope parts of all keys, then to all values
    queries: LowRank | None  # to each query's nope part, then its rope part


def to_latent(
    section: Config, tensors: Mapping[str, Tensor], moment: Tensor | None, options: LatentOptions
) -> Converted:
    """section, tensors: of grouped-query attention; moment: of its input, see `factorise`.

    Raises ValueError for what latent attention cannot hold, and for sizes that do not fit.
    """
    teacher = settings_of(section, GroupedQueryAttention)
    if teacher["qk_norm"]:
        raise ValueError(
            "qk_norm is true; a norm of each key head is no linear map of a latent, so latent "
            "attention cannot stand for it; allowed: false, or recipe=linear"
        )
    attention = read_attention(section, tensors)
    stages = part_rope(attention, teacher, options, moment)
    parted = stages[-1].form
    kv, exact = compress_keys(attention, parted, options, moment)
    form = with_keys(parted, kv)
    queries: LowRank | None = None
    stages.append(Stage("kv_rank", exact, form))
    if options.q_rank is not None:
        queries, exact = compress_queries(attention, form, options, moment)
        form = with_queries(form, queries)
        stages.append(Stage("q_rank", exact, form))
    found = Compressed(form, kv, queries)
    section = latent_section(attention, found, options) | rope_keys(teacher, form.frequencies)
    values = latent_tensors(attention, found, options, moment)
    if teacher["output_gate"]:
        section["output_gate"] = True
        values["gate_proj.weight"] = tensors["gate_proj.weight"]
    return Converted(section, lambda mixer: mixer.load_state_dict(values), tuple(stages))


def compress_keys(
    attention: Attention, form: Decoupled, options: LatentOptions, moment: Tensor | None
) -> tuple[LowRank, bool]:
    """Nope parts of keys, then values, and whether nothing is lost."""
    keys, values = form.key_nope.flatten(0, 1), form.value.flatten(0, 1)
    most = min(form.key_rank + len(values), _inputs(attention))
    rank = _size("kv_rank", options.kv_rank, most)
    data = moment if options.low_rank == "pca" and rank < most else None
    ratio = values.new_ones(())
    if options.balance is not None:
        ratio = (power(keys, data).sum() / power(values, data).sum()).sqrt() / options.balance
    beside = keys[:0] if form.beside is None else form.beside
    found = factorise(torch.cat([keys / ratio, values, beside]), rank, data)
    key_up, value_up, _ = found.up.split([len(keys), len(values), len(beside)])
    return LowRank(torch.cat([key_up * ratio, value_up]), found.down), rank == most


def compress_queries(
    attention: Attention, form: Decoupled, options: LatentOptions, moment: Tensor | None
) -> tuple[LowRank, bool]:
    """Nope and rope parts, and whether nothing is lost."""
    assert options.q_rank is not None
    heads, head_dim, _ = attention.query.shape
    most = min(heads * head_dim, _inputs(attention))
    rank = _size("q_rank", options.q_rank, most)
    data = moment if options.low_rank == "pca" and rank < most else None
    return factorise(_queries(form).flatten(0, 1), rank, data), rank == most


def with_keys(form: Decoupled, kv: LowRank) -> Decoupled:
    heads, nope, _ = form.key_nope.shape
    keys, values = kv.product().split([heads * nope, len(kv.up) - heads * nope])
    return replace(form, key_nope=keys.view_as(form.key_nope), value=values.view_as(form.value))


def with_queries(form: Decoupled, queries: LowRank) -> Decoupled:
    both = queries.product().unflatten(0, (len(form.query_nope), -1))
    sizes = [form.query_nope.shape[1], form.query_rope.shape[1]]
    nope, rope = both.split(sizes, dim=1)
    return replace(form, query_nope=nope, query_rope=rope)


def latent_section(attention: Attention, found: Compressed, options: LatentOptions) -> Config:
    """Without the keys `rope_*` and the gate."""
    form = found.form
    shared = None if options.full_kv_heads or attention.group == 1 else len(form.value)
    return {
        "_target_": target(MultiHeadLatentAttention),
        "_partial_": True,
        "num_heads": len(form.query_nope),
        "num_kv_heads": shared,
        "kv_rank": len(found.kv.down),
        "nope_dim": form.query_nope.shape[1],
        "rope_dim": form.query_rope.shape[1],
        "v_dim": form.value.shape[1],
        "q_rank": None if found.queries is None else len(found.queries.down),
        "latent_norm": options.latent_norm,
        "bias": attention.biased,
    }


def latent_tensors(
    attention: Attention, found: Compressed, options: LatentOptions, moment: Tensor | None
) -> dict[str, Tensor]:
    form, kv, queries = found
    heads, nope, _ = form.key_nope.shape
    key_up, value_up = kv.up.split([heads * nope, len(kv.up) - heads * nope])
    up = torch.cat([x.unflatten(0, (heads, -1)) for x in (key_up, value_up)], dim=1)
    if options.full_kv_heads:
        up = repeat_heads(up, attention.group)
    tensors = {
        "kv_up.weight": up.flatten(0, 1),
        **linear("kv_down", torch.cat([kv.down, form.key_rope]), bias=attention.biased),
        **output(attention),
    }
    # The mixer divides by the root of its width; `form` has the scale in the queries.
    scale = math.sqrt(form.query_nope.shape[1] + form.query_rope.shape[1])
    if queries is None:
        query = scale * _queries(form).flatten(0, 1)
        tensors |= linear("q_proj", query, bias=attention.biased)
    else:
        tensors |= linear("q_down", queries.down, bias=attention.biased)
        tensors["q_up.weight"] = scale * queries.up
    if options.latent_norm:
        for name, low in (("kv_norm", kv), ("q_norm", queries)):
            if low is not None:
                size = power(low.down, moment).mean().sqrt()
                tensors[f"{name}.weight"] = size.expand(len(low.down))
    return tensors


def linear(name: str, maps: Tensor, *, bias: bool) -> dict[str, Tensor]:
    """The parameters of a linear layer [rows, d_model + 1]; without bias its column is zeros."""
    weight = {f"{name}.weight": maps[:, :-1]}
    return weight | {f"{name}.bias": maps[:, -1]} if bias else weight


def output(attention: Attention) -> dict[str, Tensor]:
    weight = {"out_proj.weight": attention.out}
    return weight | {"out_proj.bias": attention.out_bias} if attention.biased else weight


def _queries(form: Decoupled) -> Tensor:
    """[H, nope + R, d_model + 1]."""
    return torch.cat([form.query_nope, form.query_rope], dim=1)


def _inputs(attention: Attention) -> int:
    """How many dimensions any map of the input spans at most."""
    return attention.query.shape[-1] - (not attention.biased)


def _size(name: str, size: Size, most: int) -> int:
    if size == "full":
        return most
    if size > most:
        raise ValueError(f"{name} is {size}; allowed: 1 to {most}, or full")
    return size
