"""Grouped-query attention, arXiv 2305.13245: the transformer baseline.

B batch, S local seq, H heads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.checks import positive
from models.mixer import Cache, Mixer, extend
from models.norm import RMSNorm
from models.ops.select import Ops
from models.rope import make_rope
from models.sequence import SequenceInfo


class GroupedQueryAttention(Mixer):
    """[B, S, d_model] -> the same; num_kv_heads key heads serve num_heads query heads.

    rope_base null gives no positions, unless rope_frequencies are given; rope_scaling has the keys
    of `models.rope_scaling`. qk_norm normalises each head's queries and keys (arXiv 2302.05442);
    output_gate multiplies a sigmoid gate on the heads' outputs (arXiv 2505.06708). qkv_bias is that
    of Qwen2 (arXiv 2407.10671). With a window a token sees itself and the window - 1 before it.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_base: float | None = 10_000.0,
        rope_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_frequencies: Sequence[float] | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        output_gate: bool = False,
        window: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        positive(window=window)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {num_kv_heads}; it must divide num_heads = {num_heads}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window = window
        inner = num_heads * head_dim
        qkv_width = inner + 2 * num_kv_heads * head_dim
        self.qkv_proj = nn.Linear(d_model, qkv_width, bias=qkv_bias)
        self.q_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.gate_proj = nn.Linear(d_model, inner, bias=False) if output_gate else None
        self.out_proj = nn.Linear(inner, d_model, bias=out_bias)
        self.rope = make_rope(
            head_dim,
            base=rope_base,
            factor=rope_factor,
            scaling=rope_scaling,
            frequencies=rope_frequencies,
        )
        self.attention = ops.softmax()
        if window is not None and "window" not in self.attention.masks:
            raise ValueError(
                f"window is {window}; {type(self.attention).__name__} takes none, "
                "ops.softmax=reference does"
            )

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = self.qkv_proj(x).unflatten(-1, (sum(heads), self.head_dim))
        q, k, v = qkv.split(heads, dim=2)  # [B, S, H, head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, info), self.rope(k, info)
        k, v = (extend(cache, name, y, window=self.window) for name, y in (("k", k), ("v", v)))
        key_info = info if cache is None else info.history(k.shape[1])
        y = self.attention(q, k, v, info, key_info=key_info, window=self.window).flatten(2)
        if self.gate_proj is not None:
            y = y * self.gate_proj(x).sigmoid()
        return self.out_proj(y)

    def flops_per_token(self, context: float) -> float:
        """Projections, then scores and values over the context, or the window in it."""
        if self.window is not None:
            context = min(context, self.window)
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * (linears + 2 * self.num_heads * self.head_dim * context)

    def state_elements(self, context: int) -> int:
        cached = context if self.window is None else min(context, self.window - 1)
        return cached * 2 * self.num_kv_heads * self.head_dim
