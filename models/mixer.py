"""What a token mixer is, and what it knows about itself."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.sequence import SequenceInfo

# What a layer remembers while decoding: convolution history, recurrent state, keys or latents. A
# mixer reads its entries and writes new ones; an empty dict starts a document.
Cache = dict[str, Tensor]


def extend(cache: Cache | None, name: str, x: Tensor) -> Tensor:
    """`x` behind the tokens that `cache[name]` holds, [batch, cached + seq, ...], and caches it."""
    if cache is None:
        return x
    if name in cache:
        x = torch.cat([cache[name], x], dim=1)
    cache[name] = x
    return x


class Mixer(nn.Module, ABC):
    """[batch, seq, d_model] -> [batch, seq, d_model], causal, documents apart.

    Constructors take d_model, then keywords. Tokens meet only in the mixer's `SequenceOp`s. The
    model resets linears and norms; any module that owns other parameters has
    `reset_parameters(std)` for them.
    """

    token_multiple: ClassVar[int] = 1  # every fragment a rank owns holds a multiple of this
    num_heads: int  # of queries: as many ranks may share its work by heads

    @abstractmethod
    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """With a cache, `info` goes on where the cached tokens of the one document ended."""

    @abstractmethod
    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs, two a multiply-add, of a token that sees `context` tokens with itself."""

    @abstractmethod
    def state_elements(self, context: int) -> int:
        """Elements remembered per sequence while decoding, after `context` tokens."""
