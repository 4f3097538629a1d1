"""Kimi Delta Attention: the gated delta rule with one forget gate per key channel.

Kimi Linear, arXiv 2510.26692; the bounded gate is that of Kimi K3, arXiv 2607.24653.
B batch, S local seq, H heads, K head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.decay import ChannelDecay
from models.mixer import Cache, Mixer, convolve, recur, reset_taps
from models.norm import RMSNorm, l2_normalise
from models.ops.select import Ops
from models.precision import widen
from models.sequence import SequenceInfo


class KimiDeltaAttention(Mixer):
    """[B, S, d_model] -> the same; linear in S, with a state of H x K x K."""

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        head_dim: int,
        conv_width: int = 4,
        gate_lower_bound: float | None = None,
        full_rank_gate: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, head_dim=head_dim, conv_width=conv_width)
        self.num_heads, self.head_dim, self.conv_width = num_heads, head_dim, conv_width
        inner = num_heads * head_dim
        self.qkv_proj = nn.Linear(d_model, 3 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * inner, conv_width))
        self.decay = ChannelDecay(
            d_model, num_heads=num_heads, head_dim=head_dim, lower_bound=gate_lower_bound
        )
        self.beta_proj = nn.Linear(d_model, num_heads, bias=False)
        if full_rank_gate:
            self.gate_proj = nn.Linear(d_model, inner, bias=False)
        else:
            self.gate_down = nn.Linear(d_model, head_dim, bias=False)
            self.gate_up = nn.Linear(head_dim, inner, bias=False)
        self.full_rank_gate = full_rank_gate
        self.out_norm = RMSNorm(head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.conv = ops.conv()
        self.recurrence = ops.delta_rule()

    def reset_parameters(self, std: float) -> None:
        reset_taps(self.conv_weight)

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        mixed = convolve(self.conv, self.qkv_proj(x), self.conv_weight, info, cache)
        q, k, v = F.silu(mixed).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = l2_normalise(q) * self.head_dim**-0.5, l2_normalise(k)  # [B, S, H, K]
        beta = widen(self.beta_proj(x)).sigmoid()  # [B, S, H]
        output = recur(self.recurrence, (q, k, v, self.decay(x), beta), info, cache)
        gate = widen(self._gate(x)).sigmoid()
        y = widen(self.out_norm(output)).flatten(2) * gate
        return self.out_proj(y.to(x.dtype))

    def _gate(self, x: Tensor) -> Tensor:
        return self.gate_proj(x) if self.full_rank_gate else self.gate_up(self.gate_down(x))

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, and decay-free read, write and query of the K x K state."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        state = 3 * self.num_heads * self.head_dim**2
        return 2 * (linears + self.conv_weight.numel() + state)

    def state_elements(self, context: int) -> int:
        history = (self.conv_width - 1) * self.conv_weight.shape[0]
        return self.num_heads * self.head_dim**2 + history
