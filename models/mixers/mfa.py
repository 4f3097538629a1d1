"""Multi-matrix factorisation attention: many wide heads, one key and one value, arXiv 2412.19255.

B batch, S local seq, H heads.
"""

from torch import Tensor, nn

from models.checks import positive
from models.mixer import Cache, Mixer, extend
from models.norm import RMSNorm
from models.ops.select import Ops
from models.rope import make_rope
from models.sequence import SequenceInfo


class FactorisedAttention(Mixer):
    """[B, S, d_model] -> the same; caches 2 head_dim values a token, whatever the heads.

    The heads' queries come from one normalised vector of q_rank channels. rope_base null gives no
    positions.
    """

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_heads: int,
        head_dim: int,
        q_rank: int,
        rope_base: float | None = 10_000.0,
        rope_factor: float = 1.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        positive(num_heads=num_heads, head_dim=head_dim, q_rank=q_rank)
        self.num_heads, self.head_dim, self.q_rank = num_heads, head_dim, q_rank
        self.down_proj = nn.Linear(d_model, q_rank + 2 * head_dim, bias=False)
        self.q_norm = RMSNorm(q_rank, eps=norm_eps)
        self.q_up = nn.Linear(q_rank, num_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(num_heads * head_dim, d_model, bias=False)
        self.rope = make_rope(
            head_dim, base=rope_base, factor=rope_factor, scaling=None, frequencies=None
        )
        self.attention = ops.softmax()

    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        widths = [self.q_rank, self.head_dim, self.head_dim]
        q, k, v = self.down_proj(x).split(widths, dim=-1)
        q = self.q_up(self.q_norm(q)).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = k.unsqueeze(2), v.unsqueeze(2)  # [B, S, 1, head_dim]
        if self.rope is not None:
            q, k = self.rope(q, info), self.rope(k, info)
        k, v = extend(cache, "k", k), extend(cache, "v", v)
        key_info = info if cache is None else info.history(k.shape[1])
        return self.out_proj(self.attention(q, k, v, info, key_info=key_info).flatten(2))

    def flops_per_token(self, context: float) -> float:
        """Projections, then scores and values over the context."""
        linears = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * (linears + 2 * self.num_heads * self.head_dim * context)

    def state_elements(self, context: int) -> int:
        return context * 2 * self.head_dim
