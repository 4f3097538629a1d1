"""The fp32 parts of recurrent mixers: how fast states forget, and what goes past them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import Island, full_precision, widen


def _reset_steps(bias: Tensor) -> None:
    step = bias.data.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
    bias.data.copy_(step + torch.log(-torch.expm1(-step)))


class DecayGate(Island):
    """Logits [B, S, H, K] -> log-decay <= 0, natural, always in fp32 or wider; K is head_dim, or 1
    for one decay per head.

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
        _reset_steps(self.bias)

    def forward(self, logits: Tensor) -> Tensor:
        with full_precision(logits):
            z = widen(logits) + self.bias.view(logits.shape[-2:])
            rate = self.log_rate.exp()[:, None]
            if self.lower_bound is None:
                return -rate * F.softplus(z)
            return self.lower_bound * torch.sigmoid(rate * z)


class TimeStep(Island):
    """Logits [B, S, H] -> time step [B, S, H] and log-decay [B, S, H, 1], in fp32 or wider.

    step = softplus(logits + bias), kept between `least` and `most`; log-decay -exp(log_rate) step.
    """

    def __init__(self, *, num_heads: int, least: float, most: float | None) -> None:
        super().__init__()
        if least < 0 or (most is not None and most <= least):
            raise ValueError(f"steps from {least} to {most}; they must be at least 0, and increase")
        self.least, self.most = least, most
        self.log_rate = nn.Parameter(torch.empty(num_heads))
        self.bias = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self, std: float) -> None:
        """Rates U(1, 16); softplus(bias) log-uniform in [1e-3, 1e-1]."""
        self.log_rate.data.uniform_(1, 16).log_()
        _reset_steps(self.bias)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(logits):
            step = F.softplus(widen(logits) + self.bias).clamp(self.least, self.most)
            return step, -(self.log_rate.exp() * step).unsqueeze(-1)


class Skip(Island):
    """[B, S, H, V] times a number per head, in fp32 or wider."""

    def __init__(self, *, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def reset_parameters(self, std: float) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return widen(x) * self.weight.unsqueeze(-1)


class HeadDecay(nn.Module):
    """[B, S, d_model] -> log-decay [B, S, H, 1]."""

    def __init__(self, d_model: int, *, num_heads: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, num_heads, bias=False)
        self.gate = DecayGate(num_heads=num_heads, head_dim=1, lower_bound=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.proj(x).unsqueeze(-1))


class ChannelDecay(nn.Module):
    """[B, S, d_model] -> log-decay [B, S, H, K], through a projection of rank head_dim."""

    def __init__(
        self, d_model: int, *, num_heads: int, head_dim: int, lower_bound: float | None = None
    ) -> None:
        super().__init__()
        self.shape = (num_heads, head_dim)
        self.down = nn.Linear(d_model, head_dim, bias=False)
        self.up = nn.Linear(head_dim, num_heads * head_dim, bias=False)
        self.gate = DecayGate(num_heads=num_heads, head_dim=head_dim, lower_bound=lower_bound)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.up(self.down(x)).unflatten(-1, self.shape))
