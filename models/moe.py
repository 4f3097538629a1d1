"""Mixture of experts with a sigmoid router and auxiliary-loss-free balancing.

Routing as in DeepSeek-V3 (arXiv 2412.19437) and Kimi Linear (arXiv 2510.26692): experts are chosen
by score plus a correction bias and weighted by the bare score; the bias is not trained but moved
after each optimiser step towards equal load. No token is dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks import positive
from models.ffn import FeedForward, SwiGLU
from models.load import BalancedRouter, count_in_backward
from models.ops.choices import choose
from models.ops.select import Ops
from models.precision import full_precision, widen
from models.sequence import SequenceInfo


class Router(BalancedRouter):
    """[tokens, d_model] -> weights and indices of the chosen experts, [tokens, top_k], in fp32."""

    def __init__(self, d_model: int, *, num_experts: int, top_k: int, scaling: float) -> None:
        super().__init__(biases=num_experts, counts=num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; it must be 1 to num_experts = {num_experts}")
        self.top_k, self.scaling = top_k, scaling
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        self.bias.zero_()
        self.counts.zero_()

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            scores = F.linear(widen(x), widen(self.weight)).sigmoid()
            best = (scores.detach() + self.bias).topk(self.top_k, dim=-1).indices
            indices = choose(best)
            weights = scores.gather(-1, indices)
            # 1e-20 as in the released model: without it, scores that all underflow give NaN.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling
            ones = valid.unsqueeze(-1).expand_as(indices).to(self.counts.dtype)
            load = torch.zeros_like(self.counts).scatter_add(0, indices.flatten(), ones.flatten())
        return count_in_backward(weights, load, self.counts), indices

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """Towards equal load."""
        load = counts.to(self.bias.dtype)
        self.bias += rate * torch.sign(load.mean() - load)


class Experts(nn.Module):
    """The weights of all experts, stacked: gate_up [experts, 2 hidden, d_model], gate rows first;
    down [experts, d_model, hidden]."""

    def __init__(self, d_model: int, *, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, hidden))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=std)


class MoE(FeedForward):
    """Routed experts plus a shared one that every token passes; hidden sizes per expert."""

    def __init__(
        self,
        d_model: int,
        *,
        ops: Ops,
        num_experts: int,
        top_k: int,
        hidden: int,
        shared_hidden: int = 0,
        routed_scaling: float = 1.0,
    ) -> None:
        super().__init__()
        positive(num_experts=num_experts, hidden=hidden, shared_hidden=shared_hidden or None)
        self.router = Router(d_model, num_experts=num_experts, top_k=top_k, scaling=routed_scaling)
        self.experts = Experts(d_model, num_experts=num_experts, hidden=hidden)
        self.shared = SwiGLU(d_model, hidden=shared_hidden) if shared_hidden else None
        self.grouped = ops.experts()

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, indices = self.router(tokens, info.valid.flatten())
        mixed = self.grouped(tokens, weights, indices, self.experts.gate_up, self.experts.down)
        mixed = mixed.view_as(x)
        return mixed if self.shared is None else mixed + self.shared(x, info)

    def flops_per_token(self) -> float:
        shared = 0 if self.shared is None else self.shared.flops_per_token()
        return 2 * (self.router.weight.numel() + self._per_expert * self.router.top_k) + shared

    def idle_parameters(self) -> int:
        return self._per_expert * (self.router.weight.shape[0] - self.router.top_k)

    @property
    def _per_expert(self) -> int:
        return self.experts.gate_up[0].numel() + self.experts.down[0].numel()
