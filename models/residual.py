"""The residual stream: a sum, or Block Attention Residuals (arXiv 2603.15031).

A stream is a tuple of tensors [batch, seq, d_model]. Each sub-layer (mixer and feed-forward both
count) reads its input from the stream and writes its output to it.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.norm import RMSNorm
from models.precision import Island, full_precision, widen

Stream = tuple[Tensor, ...]


class Residual(nn.Module, ABC):
    """What one sub-layer does with the stream: called with it, it gives the sub-layer's input."""

    @abstractmethod
    def forward(self, stream: Stream) -> Tensor: ...

    @abstractmethod
    def write(self, stream: Stream, output: Tensor) -> Stream: ...


class SumResidual(Residual):
    """One running sum: the plain pre-norm transformer."""

    def forward(self, stream: Stream) -> Tensor:
        return stream[0]

    def write(self, stream: Stream, output: Tensor) -> Stream:
        return (stream[0] + output,)


class AttentionResidual(Residual, Island):
    """Reads a softmax mix of the stream, which holds the embedding and the sum of each block.

    The key of a source is its RMSNorm, the query a learned vector, zero at the start: an even mix.
    There is no 1/sqrt(d) scale. The first sub-layer of a block opens a new sum, the others add to
    it, so a block boundary reads all full blocks before it starts its own.
    """

    def __init__(self, d_model: int, *, opens_block: bool, norm_eps: float) -> None:
        super().__init__()
        self.opens_block = opens_block
        self.query = nn.Parameter(torch.empty(d_model))
        self.norm = RMSNorm(d_model, eps=norm_eps)

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.query)

    def forward(self, stream: Stream) -> Tensor:
        with full_precision(stream[0]):
            query = widen(self.query)
            scores = torch.stack([self.norm(widen(source)) @ query for source in stream], dim=-1)
            shares = scores.softmax(-1).to(stream[0].dtype)
        mixed = stream[0] * shares[..., :1]
        for i, source in enumerate(stream[1:], start=1):
            mixed = torch.addcmul(mixed, source, shares[..., i : i + 1])
        return mixed

    def write(self, stream: Stream, output: Tensor) -> Stream:
        if self.opens_block:
            return (*stream, output)
        return (*stream[:-1], stream[-1] + output)
