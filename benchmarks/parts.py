"""What suite=attention measures: an operation with random inputs, or a block of layers, on the
tokens of one rank.

A token's numbers depend on the seed and on its index in the packed sequence alone, so that the
ranks of any layout hold parts of the same inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.job import Config
from benchmarks.settings import Mask, Part
from benchmarks.subjects import initialised_model
from models.norm import l2_normalise
from models.ops.latent import keys_and_values
from models.precision import autocast
from models.residual import Stream
from models.sequence import SequenceInfo
from trainer.build import build_ops
from trainer.settings import Numerics, Precision

HYBRID = ["kda", "kda", "kda", "mla"]
CAUSAL_ONLY: dict[Part, str] = {  # why
    "kda": "a recurrence is causal by definition",
    "hybrid": "three of its four layers are recurrences, causal by definition",
}
BLOCK = 256  # tokens drawn at once


@dataclass(frozen=True)
class Shared:
    """A part on one rank; schemes replace the operations in `module`."""

    module: nn.Module
    tokens: list[Tensor]  # [1, seq, ...], of this rank's tokens
    weights: list[Tensor]  # the same on all ranks
    run: Callable[[], Tensor]  # -> [1, seq, ...]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.tokens, *self.weights]


class Operation(NamedTuple):
    tokens: list[Tensor]
    weights: list[Tensor]
    function: Callable[..., Tensor]  # of the op, the `SequenceInfo`, tokens and weights


class Draw:
    """Normal numbers for the tokens at these indices; zeros for those at -1, which is padding."""

    def __init__(self, index: Tensor, *, seed: int, precision: Precision, device: str) -> None:
        self.index, self.seed, self.device = index, seed, device
        self.numerics = Numerics(precision)
        self.drawn = 0  # tensors

    def __call__(self, *shape: int, then: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
        """[1, seq, *shape], through `then`; the same numbers in fp32 and fp64."""
        out = torch.zeros(len(self.index), *shape)
        blocks = self.index.div(BLOCK, rounding_mode="floor")
        for block in blocks[self.index >= 0].unique().tolist():
            here = blocks == block
            rows = self._normal(block, BLOCK, *shape)
            out[here] = rows[self.index[here] % BLOCK]
        self.drawn += 1
        return then(out).to(self.device, self.numerics.parameters).unsqueeze(0)

    def weight(self, *shape: int) -> Tensor:
        """The same on all ranks, of a size that keeps that of its last dim's sum."""
        self.drawn += 1
        drawn = self._normal(0, *shape) * shape[-1] ** -0.5
        return drawn.to(self.device, self.numerics.parameters)

    def _normal(self, block: int, *shape: int) -> Tensor:
        generator = np.random.default_rng((self.seed, self.drawn, block))
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def build_part(part: Part, config: Config, info: SequenceInfo, draw: Draw, mask: Mask) -> Shared:
    """config: sections of train.yaml; the sizes are those of its mixers.

    Raises ValueError for a part of CAUSAL_ONLY under another mask.
    """
    causal = mask == "causal"
    if part in CAUSAL_ONLY and not causal:
        raise ValueError(f"{part} under a {mask} mask: {CAUSAL_ONLY[part]}")
    if part == "hybrid":
        return _hybrid(config, info, draw)
    ops = build_ops(config["ops"], draw.device, draw.numerics.products)
    choices: dict[Part, tuple[Callable[[Config, Draw], Operation], Callable[[], nn.Module]]] = {
        "softmax": (_softmax, partial(ops.softmax, causal=causal)),
        "mla_keys": (_mla_keys, partial(ops.softmax, causal=causal)),
        "mla": (_mla, partial(ops.latent, causal=causal)),
        "kda": (_kda, ops.delta_rule),
    }
    build, op = choices[part]
    module = nn.ModuleDict({"op": op()})
    tokens, weights, function = build(config["mixer"], draw)
    leaves = [x.requires_grad_() for x in (*tokens, *weights)]
    return Shared(module, tokens, weights, lambda: function(module["op"], info, *leaves))


def _softmax(mixers: Config, draw: Draw) -> Operation:
    gqa = mixers["gqa"]
    heads, kv_heads, dim = gqa["num_heads"], gqa["num_kv_heads"], gqa["head_dim"]
    tokens = [draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, dim)]
    return Operation(tokens, [], lambda op, info, q, k, v: op(q, k, v, info))


def _mla(mixers: Config, draw: Draw) -> Operation:
    mla = mixers["mla"]
    heads, nope, rope = mla["num_heads"], mla["nope_dim"], mla["rope_dim"]
    tokens = [draw(heads, nope + rope), draw(mla["kv_rank"]), draw(rope)]
    weights = [draw.weight(heads, nope + mla["v_dim"], mla["kv_rank"])]
    return Operation(tokens, weights, lambda op, info, *x: op(*x, info))


def _mla_keys(mixers: Config, draw: Draw) -> Operation:
    """Keys and values are made before the operation, and travel in place of latents."""

    def attend(op: nn.Module, info: SequenceInfo, q, latent, shared_key, up_weight) -> Tensor:
        k, v = keys_and_values(latent, shared_key, up_weight, mixers["mla"]["nope_dim"])
        return op(q, k, v, info)

    return _mla(mixers, draw)._replace(function=attend)


def _kda(mixers: Config, draw: Draw) -> Operation:
    heads, dim = mixers["kda"]["num_heads"], mixers["kda"]["head_dim"]
    tokens = [
        draw(heads, dim, then=lambda x: l2_normalise(x) * dim**-0.5),
        draw(heads, dim, then=l2_normalise),
        draw(heads, dim),
        draw(heads, dim, then=lambda x: -0.1 * x.exp()),
        draw(heads, then=torch.sigmoid),
    ]

    def mix(op: nn.Module, info: SequenceInfo, q, k, v, *gates: Tensor) -> Tensor:
        return op(q, k, *autocast(v), *gates, info).output  # the others are never narrower

    return Operation(tokens, [], mix)


def _hybrid(config: Config, info: SequenceInfo, draw: Draw) -> Shared:
    """Three KDA layers and one of MLA, each with its feed-forward; dense, as the choice of experts
    differs between dtypes."""
    sizes = {"pattern": HYBRID, "num_layers": len(HYBRID), "moe": None}
    config = {**config, "model": {**config["model"], **sizes}}
    precision = draw.numerics.precision
    model = initialised_model(config, seed=draw.seed, device=draw.device, dtype=precision)
    model.to(draw.numerics.parameters)
    weights: list[Tensor] = [*model.layers.parameters(), *model.residual.parameters()]
    x = draw(config["model"]["d_model"]).requires_grad_()

    def run() -> Tensor:
        stream: Stream = (x,)
        for layer in model.layers:
            stream = layer(stream, info)
        return model.residual(stream)

    return Shared(model, [x], weights, run)
