"""What a token mixer is, and what it knows about itself."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.ops.conv import behind
from models.sequence import CausalConv, LinearRecurrence, SequenceInfo

# What a layer remembers while decoding: convolution history, recurrent state, keys or latents. A
# mixer reads its entries and writes new ones; an empty dict starts a document.
Cache = dict[str, Tensor]


def extend(cache: Cache | None, name: str, x: Tensor, *, window: int | None = None) -> Tensor:
    """`x` behind the tokens that `cache[name]` holds, [batch, cached + seq, ...], and caches it; of
    a window what the next token will see."""
    if cache is None:
        return x
    if name in cache:
        x = torch.cat([cache[name], x], dim=1)
    kept = x.shape[1] if window is None else min(window - 1, x.shape[1])
    cache[name] = x if kept == x.shape[1] else x[:, x.shape[1] - kept :].clone()
    return x


def convolve(
    conv: CausalConv, x: Tensor, weight: Tensor, info: SequenceInfo, cache: Cache | None
) -> Tensor:
    """`x` through a convolution that goes on from `cache["conv"]`; the weight comes in its dtype,
    like that of a linear layer."""
    history = None if cache is None else cache.get("conv")
    if cache is not None:
        cache["conv"] = behind(history, x, weight.shape[1] - 1)[:, x.shape[1] :].clone()
    return conv(x, weight.to(x.dtype), info, history=history)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, seq, fewer heads, dim] -> [batch, seq, heads, dim], each head so often in a row."""
    repeats = heads // x.shape[2]
    return x if repeats == 1 else x.unsqueeze(3).expand(-1, -1, -1, repeats, -1).flatten(2, 3)


def reset_taps(weight: Tensor) -> None:
    """Those of a depthwise convolution, [channels, width]: uniform, of variance 1 / (3 width)."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def recur(
    recurrence: LinearRecurrence,
    tensors: tuple[Tensor, ...],
    info: SequenceInfo,
    cache: Cache | None,
) -> Tensor:
    """The output of a recurrence of q, k, v, log_decay, beta that goes on from `cache["state"]`."""
    state = None if cache is None else cache.get("state")
    output, final = recurrence(*tensors, info, initial_state=state)
    if cache is not None:
        cache["state"] = final
    return output


class Mixer(nn.Module, ABC):
    """[batch, seq, d_model] -> [batch, seq, d_model], causal, documents apart.

    Constructors take d_model, then keywords. Tokens meet only in the mixer's `SequenceOp`s. The
    model resets linears and norms; any module that owns other parameters has
    `reset_parameters(std)` for them.
    """

    token_multiple: int = 1  # every fragment a rank owns holds a multiple of this
    num_heads: int  # of queries: as many ranks may share its work by heads
    place = 0, 1  # its layer, counted from 0, and how many there are; the model sets it

    @abstractmethod
    def forward(self, x: Tensor, info: SequenceInfo, cache: Cache | None = None) -> Tensor:
        """With a cache, `info` goes on where the cached tokens of the one document ended."""

    @abstractmethod
    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs, two a multiply-add, of a token that sees `context` tokens with itself."""

    @abstractmethod
    def state_elements(self, context: int) -> int:
        """Elements remembered per sequence while decoding, after `context` tokens."""
