"""Position-wise feed-forward layers. `moe.py` holds the mixture of experts, of the same shape."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.sequence import SequenceInfo


class FeedForward(nn.Module, ABC):
    """[batch, seq, d_model] -> the same, each token by itself."""

    @abstractmethod
    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor: ...

    @abstractmethod
    def flops_per_token(self) -> float:
        """Forward FLOPs, two a multiply-add."""

    @abstractmethod
    def idle_parameters(self) -> int:
        """Parameters that one token does not use."""


class SwiGLU(FeedForward):
    """down(silu(gate x) * up x), arXiv 2002.05202."""

    def __init__(self, d_model: int, *, hidden: int) -> None:
        super().__init__()
        positive(hidden=hidden)
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)  # gate rows first
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def flops_per_token(self) -> float:
        return 2 * (self.gate_up.weight.numel() + self.down.weight.numel())

    def idle_parameters(self) -> int:
        return 0
