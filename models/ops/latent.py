"""Multi-head latent attention over a softmax op, in the cheaper of its two equal forms.

DeepSeek-V2, arXiv 2405.04434: keys and values of all heads are linear in one latent per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.softmax import EinsumSoftmax
from models.precision import autocast
from models.sequence import LatentAttention, SequenceInfo, SoftmaxAttention


class MaterialisedLatent(LatentAttention):
    """Up-projects keys and values and attends with `softmax`; queries that are few against their
    keys, as in decoding, attend to the latents themselves instead. Causal if `softmax` is.

    The absorbed form maps the queries through the key half of the up-projection and the mixed
    latents through its value half, so keys are never up-projected. It runs on the definition of
    softmax: its score matrix is small, and its head dim, rank + rope, beyond fused kernels.
    """

    def __init__(self, softmax: SoftmaxAttention) -> None:
        super().__init__()
        self.softmax = softmax
        self.few_queries = EinsumSoftmax(causal=softmax.causal)

    def forward(
        self,
        q: Tensor,
        latent: Tensor,
        shared_key: Tensor,
        up_weight: Tensor,
        info: SequenceInfo,
        *,
        key_info: SequenceInfo | None = None,
        scale: float | None = None,
    ) -> Tensor:
        q, latent, shared_key, up_weight = autocast(q, latent, shared_key, up_weight)
        nope, scale = q.shape[-1] - shared_key.shape[-1], scale or q.shape[-1] ** -0.5
        key_up, value_up = up_weight.split([nope, up_weight.shape[1] - nope], dim=1)
        if absorbs(q.shape[1], latent.shape[1], nope, value_up.shape[1], latent.shape[-1]):
            keys = torch.cat([latent, shared_key], dim=-1).unsqueeze(2)
            absorbed = torch.einsum("bshn,hnr->bshr", q[..., :nope], key_up)
            q = torch.cat([absorbed, q[..., nope:]], dim=-1)
            values = latent.unsqueeze(2)
            mixed = self.few_queries(q, keys, values, info, key_info=key_info, scale=scale)
            return torch.einsum("bshr,hvr->bshv", mixed, value_up)
        k, v = keys_and_values(latent, shared_key, up_weight, nope)
        return self.softmax(q, k, v, info, key_info=key_info, scale=scale)


def keys_and_values(
    latent: Tensor, shared_key: Tensor, up_weight: Tensor, nope: int
) -> tuple[Tensor, Tensor]:
    """What the latents stand for: k [batch, key_seq, heads, nope + rope] and v [..., v_dim]."""
    up = F.linear(latent, up_weight.flatten(0, 1)).unflatten(-1, up_weight.shape[:2])
    shared = shared_key.unsqueeze(2).expand(-1, -1, up.shape[2], -1)
    k, v = up.split([nope, up.shape[3] - nope], dim=-1)
    return torch.cat([k, shared], dim=-1), v


def absorbs(seq: int, key_seq: int, nope: int, v_dim: int, rank: int) -> bool:
    """Whether absorbing the up-projection takes fewer multiplications, per head.

    Up-projecting key_seq keys costs key_seq rank (nope + v_dim), absorbing seq queries costs seq
    rank (nope + v_dim), but then each of the seq key_seq scores and mixtures is over rank entries
    instead of nope and v_dim. With Kimi Linear's 128, 128, 512 it pays up to 170 queries against
    many keys, and never when queries are as many as keys.
    """
    saved = (key_seq - seq) * rank * (nope + v_dim)
    return saved > seq * key_seq * (2 * rank - nope - v_dim) and seq < key_seq
