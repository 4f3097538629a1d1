"""Kimi Delta Attention: the gated delta rule with one forget gate per key channel.

Kimi Linear, arXiv 2510.26692; the bounded gate is that of Kimi K3, arXiv 2607.24653.
B batch, S local seq, H heads, K head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.mixer import Cache, Mixer
from models.norm import RMSNorm
from models.ops.conv import behind
from models.ops.select import Ops
from models.precision import Island, full_precision, widen
from models.sequence import SequenceInfo


class DecayGate(Island):
    """Logits [B, S, H, K] -> log-decay <= 0, natural, always in fp32 or wider.

    -exp(log_rate) softplus(z), or between lower_bound and 0: lower_bound sigmoid(exp(log_rate) z),
    with z = logits + bias.
    """

    def __init__(self, *, num_heads: int, head_dim: int, lower_bound: float | None) -> None:
        super().__init__()
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"gate_lower_bound is {lower_bound}; it must be negative, or null")
        self.lower_bound = lower_bound
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim))

    def reset_parameters(self, std: float) -> None:
        """Rates U(1, 16), 1 for the bounded gate; softplus(bias) log-uniform in [1e-3, 1e-1]."""
        if self.lower_bound is None:
            self.log_rate.data.uniform_(1, 16).log_()
        else:
            nn.init.zeros_(self.log_rate)
        step = self.bias.data.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        self.bias.data.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, logits: Tensor) -> Tensor:
        with full_precision(logits):
            z = widen(logits) + self.bias.view(logits.shape[-2:])
            rate = self.log_rate.exp()[:, None]
            if self.lower_bound is None:
                return -rate * F.softplus(z)
            return self.lower_bound * torch.sigmoid(rate * z)


class Decay(nn.Module):
    """[B, S, d_model] -> log-decay [B, S, H, K], through a projection of rank head_dim."""

    def __init__(
        self, d_model: int, *, num_heads: int, head_dim: int, lower_bound: float | None
    ) -> None:
        super().__init__()
        self.shape = (num_heads, head_dim)
        self.down = nn.Linear(d_model, head_dim, bias=False)
        self.up = nn.Linear(head_dim, num_heads * head_dim, bias=False)
        self.gate = DecayGate(num_heads=num_heads, head_dim=head_dim, lower_bound=lower_bound)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.up(self.down(x)).unflatten(-1, self.shape))


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dim, in fp32 or wider."""
    x = widen(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


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
        self.decay = Decay(
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
        bound = self.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        q, k, v = self._mix_locally(self.qkv_proj(x), info, cache)  # [B, S, H, K]
        q, k = l2_normalise(q) * self.head_dim**-0.5, l2_normalise(k)
        beta = widen(self.beta_proj(x)).sigmoid()  # [B, S, H]
        state = None if cache is None else cache.get("state")
        mixed = self.recurrence(q, k, v, self.decay(x), beta, info, initial_state=state)
        if cache is not None:
            cache["state"] = mixed.final_state
        gate = widen(self._gate(x)).sigmoid()
        y = widen(self.out_norm(mixed.output)).flatten(2) * gate
        return self.out_proj(y.to(x.dtype))

    def _mix_locally(
        self, qkv: Tensor, info: SequenceInfo, cache: Cache | None
    ) -> tuple[Tensor, ...]:
        history = None if cache is None else cache.get("conv")
        weight = self.conv_weight.to(qkv.dtype)  # like the weights of a linear layer
        mixed = F.silu(self.conv(qkv, weight, info, history=history))
        if cache is not None:
            cache["conv"] = behind(history, qkv, self.conv_width - 1)[:, qkv.shape[1] :].clone()
        return mixed.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)

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
