"""Which chunks of a document softmax attention remembers, and which a recurrent state: by head.

NAtS-L, arXiv 2602.03681. A chunk's decision pools all its tokens, but only later chunks feel it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.load import BalancedRouter, count_in_backward
from models.ops.choices import choose
from models.ops.routed_grid import ChunkGrid
from models.precision import full_precision, widen

MARGINS = 16  # edges of either sign between bins of margins, each twice the one before
CLOSE = 0.01  # a share that is so far from its target meets it


class Routing(NamedTuple):
    """[batch, chunks, heads], 1 for one and 0 for the other, fp32 or wider; for padding 0 and 1."""

    keep: Tensor  # for softmax attention
    write: Tensor  # to the state


class LearnedRouter(BalancedRouter):
    """Chunk means [batch, chunks, d_model] -> `Routing` by the larger of two logits.

    Straight-through: the gradient is that of softmax(logits / temperature), of the branch taken
    alone or, counterfactual, of both.

    A target is held by one bias of all the heads. Logits drift and spread by orders of magnitude,
    so that no fixed step would do: `counts` has the margins of the choices, too, in bins that are
    narrow where a choice is close, which tell how far off the bias was. `trend` is what the bias
    moves by without that, as logits that drift would otherwise stay ahead of it.
    """

    trend: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        temperature: float = 1.0,
        target: float | None = None,
        counterfactual: bool = False,
    ) -> None:
        self.branches = 2 * num_heads  # of all heads
        super().__init__(biases=1, counts=self.branches + 2 * MARGINS + 2)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if target is not None and not 0 <= target <= 1:
            raise ValueError(f"softmax_target is {target}; it must be 0 to 1, or null")
        self.temperature, self.target = temperature, target
        self.counterfactual = counterfactual
        self.weight = nn.Parameter(torch.empty(self.branches, d_model))
        self.register_buffer("trend", torch.zeros(1))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        self.trend.zero_()
        self.bias.zero_()
        self.counts.zero_()

    def forward(self, mean: Tensor, grid: ChunkGrid) -> Routing:
        with full_precision(mean):
            logits = F.linear(widen(mean), widen(self.weight)).unflatten(-1, (-1, 2))
            logits = torch.cat((logits[..., :1] + self.bias, logits[..., 1:]), dim=-1)
            best = F.one_hot(choose(logits.detach().argmax(-1)), 2)  # [B, N, H, 2], softmax first
            soft = (logits / self.temperature).softmax(-1)
            gates = best + (soft - soft.detach())
            if not self.counterfactual:
                gates = gates * best
            gates = count_in_backward(gates, self._load(logits.detach(), best, grid), self.counts)
            return _ignoring_padding(gates, grid)

    def _load(self, logits: Tensor, best: Tensor, grid: ChunkGrid) -> Tensor:
        """Tokens by head and branch, and by margin over all heads, as `counts`."""
        tokens = (grid.length * grid.real).unsqueeze(-1)
        taken = (best * tokens.unsqueeze(-1)).sum((0, 1)).flatten()
        edges = _edges(logits.device)
        bins = torch.bucketize(logits[..., 0] - logits[..., 1], edges)
        margins = tokens.new_zeros(len(edges) + 1)
        margins.index_add_(0, bins.flatten(), tokens.expand_as(bins).flatten())
        return torch.cat((taken, margins))

    def share(self, counts: Tensor) -> Tensor:
        """[heads], of the tokens that `counts` holds those that were kept."""
        kept, written = counts[: self.branches].unflatten(0, (-1, 2)).unbind(1)
        return kept / (kept + written).clamp(min=1)

    @property
    def expected_share(self) -> float:
        """What to reckon with before any data is seen."""
        return 0.5 if self.target is None else self.target

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """Half the way to the nearest bias that would have met the target, if there is one, and
        with the trend; more than a sixteenth of the way for that would make both swing."""
        if self.target is not None:
            missing = self._missing(counts[self.branches :], self.target).to(self.bias.dtype)
            self.bias += missing / 2 + self.trend
            self.trend += missing / 16

    def _missing(self, margins: Tensor, target: float) -> Tensor:
        """What the bias was too low by; margins: tokens by bin."""
        above = margins.flip(0).cumsum(0).flip(0).double()
        total, above = above[0], above[1:]  # of all, and behind each edge
        most, least = (total * share for share in (target + CLOSE, target - CLOSE))
        lowest, highest = (_crossing(above, tokens) for tokens in (most, least))
        return -torch.zeros_like(total).clamp(lowest, highest) * (total > 0)


def _edges(device: torch.device) -> Tensor:
    """Between bins of margins: 0, and powers of two of either sign."""
    powers = 2.0 ** torch.arange(-8, MARGINS - 8, device=device)
    return torch.cat((-powers.flip(0), powers.new_zeros(1), powers))


def _crossing(above: Tensor, tokens: Tensor) -> Tensor:
    """The margin with so many tokens above it; above: those above each edge."""
    edges = _edges(above.device).to(above.dtype)
    behind = (above > tokens).sum().clamp(1, len(edges) - 1)
    many, few = above[behind - 1], above[behind]
    part = (many - tokens) / (many - few).clamp(min=1)
    return edges[behind - 1].lerp(edges[behind], part.clamp(0, 1))


class StaticRouter(nn.Module):
    """Routing by place, as a control: the same share of the chunks of every document.

    strided: the last of every 1 / share chunks; else by a hash of chunk, head and layer.
    """

    salt: Tensor

    def __init__(self, *, num_heads: int, share: float, strided: bool) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"static_share is {share}; it must be 0 to 1")
        self.num_heads, self.share, self.strided = num_heads, share, strided
        self.register_buffer("salt", torch.zeros((), dtype=torch.int64))

    @property
    def expected_share(self) -> float:
        return self.share

    def reset_salt(self) -> None:
        """Draws what tells this layer from others."""
        self.salt.random_(0, 2**31)

    def forward(self, mean: Tensor, grid: ChunkGrid) -> Routing:
        number = torch.where(grid.length > 0, grid.start - grid.document, 0) // grid.chunk
        if self.strided:
            done, before = ((number + i) * self.share for i in (1, 0))
            keep = (done.floor() > before.floor()).unsqueeze(-1).expand(-1, -1, self.num_heads)
        else:
            heads = torch.arange(self.num_heads, device=number.device)
            places = number.unsqueeze(-1) * self.num_heads + heads
            keep = _uniform(places + self.salt * 0x9E3779B1) < self.share
        with full_precision(mean):
            gates = torch.stack((keep, ~keep), dim=-1).to(widen(mean[:0]).dtype)
            return _ignoring_padding(gates, grid)


def _uniform(x: Tensor) -> Tensor:
    """Integers -> [0, 1) as if at random: the finaliser of MurmurHash3."""
    mask = 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = x & mask
        x = (x ^ (x >> shift)) * factor
    return (x & mask).double() / 2**32


def _ignoring_padding(gates: Tensor, grid: ChunkGrid) -> Routing:
    real = grid.real.unsqueeze(-1)
    keep, write = gates.unbind(-1)
    return Routing(keep.where(real, 0), write.where(real, 1))
