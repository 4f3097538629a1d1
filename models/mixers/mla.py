"""Multi-head latent attention: keys and values of all heads from one low-rank latent.

DeepSeek-V2, arXiv 2405.04434; without positions (rope_base null) as in Kimi Linear, arXiv
2510.26692. B batch, S local seq, H heads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.checks import positive
from models.mixer import Cache, Mixer, extend
from models.norm import RMSNorm
from models.ops.select import Ops
from models.precision import autocast
from models.rope import make_rope
from models.sequence import SequenceInfo


class MultiHeadLatentAttention(Mixer):
    """[B, S, d_model] -> the same; caches kv_rank + rope_dim values a token.

    Each query and key has nope_dim channels of its own and rope_dim that all heads' keys share,
    rotated where rope_base or rope_frequencies are given; rope_scaling has the keys of
    `models.rope_scaling`. q_rank compresses queries too; output_gate multiplies a sigmoid gate on
    the heads' outputs, as in Kimi K3. What converted models need: no latent_norm; num_kv_heads keys
    and values that serve num_heads queries (arXiv 2505.17272); a bias on the projections to queries
    (or their latent), to the latent, and out; scores scaled by other than
    (nope_dim + rope_dim)^-0.5.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        q_rank: int | None = None,
        num_kv_heads: int | None = None,
        latent_norm: bool = True,
        bias: bool = False,
        scale: float | None = None,
        rope_base: float | None = None,
        rope_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_frequencies: Sequence[float] | None = None,
        output_gate: bool = False,
        norm_eps: float = 1e-6,  # of the latent norms; the released models differ here from 1e-5
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, kv_rank=kv_rank, rope_dim=rope_dim, v_dim=v_dim)
        positive(q_rank=q_rank, num_kv_heads=num_kv_heads)
        if nope_dim < 0:
            raise ValueError(f"nope_dim is {nope_dim}; it must be at least 0")
        if scale is not None and scale <= 0:
            raise ValueError(f"scale is {scale}; it must be above 0, or null")
        self.num_heads, self.kv_rank = num_heads, kv_rank
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {num_kv_heads}; it must divide num_heads = {num_heads}"
            )
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        self.scale = scale

        def norm(rank: int) -> nn.Module:
            return RMSNorm(rank, eps=norm_eps) if latent_norm else nn.Identity()

        q_width = num_heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q_proj = nn.Linear(d_model, q_width, bias=bias)
        else:
            self.q_down = nn.Linear(d_model, q_rank, bias=bias)
            self.q_norm = norm(q_rank)
            self.q_up = nn.Linear(q_rank, q_width, bias=False)
        self.q_rank = q_rank
        self.kv_down = nn.Linear(d_model, kv_rank + rope_dim, bias=bias)
        self.kv_norm = norm(kv_rank)
        self.kv_up = nn.Linear(kv_rank, self.num_kv_heads * (nope_dim + v_dim), bias=False)
        self.out_proj = nn.Linear(num_heads * v_dim, d_model, bias=bias)
        self.gate_proj = nn.Linear(d_model, num_heads * v_dim, bias=False) if output_gate else None
        self.rope = make_rope(
            rope_dim,
            base=rope_base,
            factor=rope_factor,
            scaling=rope_scaling,
            frequencies=rope_frequencies,
        )
        self.attention = ops.latent()

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        q = self._query(x).unflatten(-1, (self.num_heads, self.nope_dim + self.rope_dim))
        latent, shared_key = self.kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latent = self.kv_norm(latent)
        if self.rope is not None:
            nope, rotated = q.split([self.nope_dim, self.rope_dim], dim=-1)
            q = torch.cat([nope, self.rope(rotated, info)], dim=-1)
            shared_key = self.rope(shared_key.unsqueeze(2), info).squeeze(2)
        latent = extend(cache, "latent", latent)
        shared_key = extend(cache, "shared_key", shared_key)
        key_info = info if cache is None else info.history(latent.shape[1])
        up, scale = self._up_weight(), self.scale
        y = self.attention(q, latent, shared_key, up, info, key_info=key_info, scale=scale)
        y = y.flatten(2)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        return self.out_proj(y)

    def _query(self, x: Tensor) -> Tensor:
        return self.q_proj(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))

    def _up_weight(self) -> Tensor:
        """[num_heads, nope_dim + v_dim, kv_rank]: heads that share keys have the same."""
        (weight,) = autocast(self.kv_up.weight)  # like that of a linear layer
        up = weight.unflatten(0, (self.num_kv_heads, self.nope_dim + self.v_dim))
        return up.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)

    def flops_per_token(self, context: float) -> float:
        """Projections (the latent is expanded once), then scores and values over the context."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        repeats = self.num_heads // self.num_kv_heads - 1
        linears += repeats * self.kv_up.weight.numel()
        per_key = self.num_heads * (self.nope_dim + self.rope_dim + self.v_dim)
        return 2 * (linears + per_key * context)

    def state_elements(self, context: int) -> int:
        return context * (self.kv_rank + self.rope_dim)
