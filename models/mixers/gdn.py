"""Gated DeltaNet: the gated delta rule with one forget gate per head, arXiv 2412.06464.

B batch, S local seq, H heads, K head_dim, V value dim of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.decay import HeadDecay
from models.mixer import Cache, Mixer, convolve, recur, repeat_heads, reset_taps
from models.norm import RMSNorm, l2_normalise
from models.ops.select import Ops
from models.precision import widen
from models.sequence import SequenceInfo


class GatedDeltaNet(Mixer):
    """[B, S, d_model] -> the same; linear in S, with a state of H x K x V, V = expand_v K.

    num_key_heads heads of queries and keys serve num_heads heads of values and states;
    negative_eigenvalues lets the transitions reflect: beta in (0, 2), arXiv 2411.12537.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        head_dim: int,
        expand_v: float = 2.0,
        num_key_heads: int | None = None,
        negative_eigenvalues: bool = False,
        conv_width: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        value_dim, key_heads = round(expand_v * head_dim), num_key_heads or num_heads
        positive(num_heads=num_heads, head_dim=head_dim, conv_width=conv_width)
        positive(num_key_heads=num_key_heads)
        if value_dim < 1 or value_dim != expand_v * head_dim:
            raise ValueError(
                f"expand_v is {expand_v}; times head_dim = {head_dim} it must be whole"
            )
        if num_heads % key_heads:
            raise ValueError(
                f"num_key_heads is {key_heads}; it must divide num_heads = {num_heads}"
            )
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.widths = [key_heads * head_dim, key_heads * head_dim, num_heads * value_dim]
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        channels, inner = sum(self.widths), num_heads * value_dim
        self.qkv_proj = nn.Linear(d_model, channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_width))
        self.decay = HeadDecay(d_model, num_heads=num_heads)
        self.beta_proj = nn.Linear(d_model, num_heads, bias=False)
        self.gate_proj = nn.Linear(d_model, inner, bias=False)
        self.out_norm = RMSNorm(value_dim, eps=norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.conv = ops.conv()
        self.recurrence = ops.delta_rule()

    def reset_parameters(self, std: float) -> None:
        reset_taps(self.conv_weight)

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        beta = self.beta_scale * widen(self.beta_proj(x)).sigmoid()  # [B, S, H]
        tensors = *self._qkv(x, info, cache), self.decay(x), beta
        output = recur(self.recurrence, tensors, info, cache)
        y = widen(self.out_norm(output)).flatten(2) * F.silu(widen(self.gate_proj(x)))
        return self.out_proj(y.to(x.dtype))

    def _qkv(
        self, x: Tensor, info: SequenceInfo, cache: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of unit length, the former scaled, [B, S, H, K]; values."""
        mixed = F.silu(convolve(self.conv, self.qkv_proj(x), self.conv_weight, info, cache))
        q, k, v = mixed.split(self.widths, dim=-1)
        q, k = (l2_normalise(y.unflatten(-1, (-1, self.head_dim))) for y in (q, k))
        q, k = (repeat_heads(y, self.num_heads) for y in (q * self.head_dim**-0.5, k))
        return q, k, v.unflatten(-1, (self.num_heads, self.value_dim))

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution, and decay-free read, write and query of the K x V state."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        state = 3 * self.num_heads * self.head_dim * self.value_dim
        return 2 * (linears + self.conv_weight.numel() + state)

    def state_elements(self, context: int) -> int:
        history = (self.conv_weight.shape[1] - 1) * self.conv_weight.shape[0]
        return self.num_heads * self.head_dim * self.value_dim + history
