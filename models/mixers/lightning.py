"""Lightning attention: linear attention with a fixed decay per head, arXiv 2401.04658.

The layer is that of MiniMax-01, arXiv 2501.08313. B batch, S local seq, H heads, K head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.mixer import Cache, Mixer, recur
from models.norm import RMSNorm
from models.ops.select import Ops
from models.precision import widen
from models.sequence import SequenceInfo


class LightningAttention(Mixer):
    """[B, S, d_model] -> the same; linear in S, with a state of H x K x K.

    Head h of H forgets 2^(-8 (h + 1) / H) nats a token in the first layer, and next to nothing in
    the last; the rates in between fall with the depth.
    """

    def __init__(
        self, d_model: int, *, ops: Ops, num_heads: int, head_dim: int, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, head_dim=head_dim)
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.qkv_proj = nn.Linear(d_model, 3 * inner, bias=False)
        self.gate_proj = nn.Linear(d_model, inner, bias=False)
        self.out_norm = RMSNorm(inner, eps=norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.recurrence = ops.decayed_sum()

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        qkv = F.silu(self.qkv_proj(x))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, S, H, K]
        ones = widen(x).new_ones(q.shape[:-1])
        log_decay = -self._rates(ones).expand_as(ones).unsqueeze(-1)
        output = recur(self.recurrence, (q, k, v, log_decay, ones), info, cache)
        y = widen(self.out_norm(output.flatten(2))) * widen(self.gate_proj(x)).sigmoid()
        return self.out_proj(y.to(x.dtype))

    def _rates(self, like: Tensor) -> Tensor:
        """[H], nats a token. The small numbers are those of the released model."""
        layer, layers = self.place
        heads = torch.arange(1, self.num_heads + 1, dtype=like.dtype, device=like.device)
        return 2 ** (-8 * heads / self.num_heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)

    def flops_per_token(self, context: float) -> float:
        """Projections, and decay-free write and query of the K x K state."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * (linears + 2 * self.num_heads * self.head_dim**2)

    def state_elements(self, context: int) -> int:
        return self.num_heads * self.head_dim**2
