"""Mamba-2: a selective state space model with one decay per head, arXiv 2405.21060.

B batch, S local seq, H heads, P head_dim, N state_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.decay import Skip, TimeStep
from models.mixer import Cache, Mixer, convolve, recur, repeat_heads, reset_taps
from models.norm import GroupedRMSNorm
from models.ops.select import Ops
from models.precision import widen
from models.sequence import SequenceInfo


class Mamba2(Mixer):
    """[B, S, d_model] -> the same; linear in S, with a state of H x N x P.

    In the terms of linear attention x is the value, B the key, C the query, as wide as N. B and C
    have num_groups heads, which also divide the output norm; with num_kv_heads, x and B have so
    many instead, as in Zebra-Llama (arXiv 2505.17272). Time steps stay between step_min and
    step_max.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        head_dim: int,
        state_dim: int,
        num_groups: int = 1,
        num_kv_heads: int | None = None,
        conv_width: int = 4,
        conv_bias: bool = True,
        step_min: float = 0.0,
        step_max: float | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, head_dim=head_dim, state_dim=state_dim, conv_width=conv_width)
        positive(num_groups=num_groups, num_kv_heads=num_kv_heads)
        for name, heads in (("num_groups", num_groups), ("num_kv_heads", num_kv_heads or 1)):
            if num_heads % heads:
                raise ValueError(f"{name} is {heads}; it must divide num_heads = {num_heads}")
        self.num_heads, self.head_dim, self.state_dim = num_heads, head_dim, state_dim
        inner = num_heads * head_dim
        key_width = (num_kv_heads or num_groups) * state_dim
        self.widths = [(num_kv_heads or num_heads) * head_dim, key_width, num_groups * state_dim]
        channels = sum(self.widths)
        self.in_widths = [inner, channels, num_heads]  # gate z; x, B, C; time step
        self.in_proj = nn.Linear(d_model, sum(self.in_widths), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_width))
        self.conv_bias = nn.Parameter(torch.empty(channels)) if conv_bias else None
        self.time_step = TimeStep(num_heads=num_heads, least=step_min, most=step_max)
        self.skip = Skip(num_heads=num_heads)
        self.out_norm = GroupedRMSNorm(inner, groups=num_groups, eps=norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.conv = ops.conv()
        self.recurrence = ops.decayed_sum()

    def reset_parameters(self, std: float) -> None:
        reset_taps(self.conv_weight)
        if self.conv_bias is not None:
            nn.init.zeros_(self.conv_bias)

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        gate, mixed, logits = self.in_proj(x).split(self.in_widths, dim=-1)
        q, k, v = self._qkv(mixed, info, cache)
        step, log_decay = self.time_step(logits)  # [B, S, H], [B, S, H, 1]
        output = recur(self.recurrence, (q, k, v, log_decay, step), info, cache)
        y = (widen(output) + self.skip(v)).flatten(2) * F.silu(widen(gate))
        return self.out_proj(self.out_norm(y).to(x.dtype))

    def _qkv(
        self, mixed: Tensor, info: SequenceInfo, cache: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """C and B, [B, S, H, N], and x, [B, S, H, P], behind convolution and SiLU."""
        mixed = convolve(self.conv, mixed, self.conv_weight, info, cache)
        if self.conv_bias is not None:
            mixed = mixed + self.conv_bias.to(mixed.dtype)
        v, k, q = F.silu(mixed).split(self.widths, dim=-1)
        v = v.unflatten(-1, (-1, self.head_dim))
        q, k = (y.unflatten(-1, (-1, self.state_dim)) for y in (q, k))
        q, k, v = (repeat_heads(y, self.num_heads) for y in (q, k, v))
        return q, k, v

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, and decay-free write and query of the N x P state."""
        linears = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        state = 2 * self.num_heads * self.state_dim * self.head_dim
        return 2 * (linears + self.conv_weight.numel() + state)

    def state_elements(self, context: int) -> int:
        history = (self.conv_weight.shape[1] - 1) * self.conv_weight.shape[0]
        return self.num_heads * self.state_dim * self.head_dim + history
