"""Softmax attention as matrices: what conversions start from, and what they pass through.

A map of the layer's input x is a matrix [..., d_model + 1] that multiplies x with a one behind it:
the last column is the bias. H query heads, N key heads, D head dim, R rotary channels. Everything
here is fp64 and meant for one layer at a time.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """Grouped-query attention; head h reads key head h // (H / N). Scores are divided by sqrt D.

    Channel i of a head turns with channel i + D / 2 at frequencies[i], which are 0 where there are
    no positions.
    """

    query: Tensor  # [H, D, d_model + 1]
    key: Tensor  # [N, D, d_model + 1]
    value: Tensor  # [N, D, d_model + 1]
    out: Tensor  # [d_model, H D]
    out_bias: Tensor  # [d_model]
    frequencies: Tensor  # [D / 2], radians a token
    biased: bool  # whether the layer has any bias

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[0] // self.key.shape[0]

    @property
    def head_dim(self) -> int:
        return self.query.shape[1]

    def scaled_query(self) -> Tensor:
        """With the scale of the scores in it."""
        return self.query / math.sqrt(self.head_dim)

    def heads(self, x: Tensor, positions: Tensor) -> "Heads":
        q, k = (
            rotate(apply(maps, x), positions, self.frequencies)
            for maps in (self.scaled_query(), self.key)
        )
        return Heads(q, k, apply(self.value, x))


@dataclass(frozen=True, eq=False)
class Decoupled:
    """Attention whose keys share one rotary part; head h reads key head h // (H / N).

    The score of a query and a key is that of their nope parts plus that of their rope parts, which
    turn like `Attention`'s; the scale is in the queries.
    """

    query_nope: Tensor  # [H, nope, d_model + 1]
    query_rope: Tensor  # [H, R, d_model + 1]
    key_nope: Tensor  # [N, nope, d_model + 1]
    key_rope: Tensor  # [R, d_model + 1]
    value: Tensor  # [N, D, d_model + 1]
    frequencies: Tensor  # [R / 2], radians a token
    key_rank: int  # how many dimensions the nope parts of all keys span at most
    beside: Tensor | None = None  # [rows, d_model + 1]: compressed along, read by nothing

    def heads(self, x: Tensor, positions: Tensor) -> "Heads":
        key_nope = apply(self.key_nope, x)
        rope = rotate(apply(self.key_rope[None], x), positions, self.frequencies)
        k = torch.cat([key_nope, rope.expand(-1, key_nope.shape[1], -1)], dim=-1)
        query_rope = rotate(apply(self.query_rope, x), positions, self.frequencies)
        q = torch.cat([apply(self.query_nope, x), query_rope], dim=-1)
        return Heads(q, k, apply(self.value, x))


class Heads(NamedTuple):
    """What a row of tokens attends with; scores are the bare products."""

    query: Tensor  # [S, H, *]
    key: Tensor  # [S, N, *]
    value: Tensor  # [S, N, D]

    def scores(self, head: int) -> Tensor:
        """[S, S] of one query head."""
        return self.query[:, head] @ self.key[:, head // self._group].T

    def output(self, seen: Tensor) -> Tensor:
        """[S, H D]; seen [S, S]: which keys each query may attend to."""
        mixed = [
            self.scores(head).masked_fill(~seen, -math.inf).softmax(-1)
            @ self.value[:, head // self._group]
            for head in range(self.query.shape[1])
        ]
        return torch.cat(mixed, dim=-1)

    @property
    def _group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]


def apply(maps: Tensor, x: Tensor) -> Tensor:
    """[heads, rows, d_model + 1] of x [S, d_model] -> [S, heads, rows]."""
    return torch.einsum("hrd,sd->shr", maps[..., :-1], x) + maps[..., -1]


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """[S, heads, R] by positions [S]; see `models.rope.Rope`."""
    angles = positions[:, None, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def pairs(maps: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D, d_model + 1] -> the first and the second channel of each pair, [..., D / 2, ...]."""
    half = maps.shape[-2] // 2
    return maps[..., :half, :], maps[..., half:, :]


def repeat_heads(maps: Tensor, times: int) -> Tensor:
    """[N, ...] -> [N times, ...], as the query heads read them."""
    return maps.repeat_interleave(times, dim=0)
