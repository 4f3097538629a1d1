"""Dropless SwiGLU experts: every token visits exactly the experts that it was routed to.

Implementations share one signature: x [tokens, d_model], weights [tokens, top_k] fp32, indices
[tokens, top_k] int64, gate_up [experts, 2 hidden, d_model] with the gate rows first, down
[experts, d_model, hidden] -> [tokens, d_model]. Inside autocast they compute in its dtype, as
linear layers do. Sums over a token's experts have a fixed order, forward and backward.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.precision import autocast, full_precision, widen


class LoopExperts(nn.Module):
    """The definition: a loop over the experts, each on the tokens that chose it."""

    def forward(
        self, x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        x, gate_up, down = autocast(x, gate_up, down)
        with full_precision(x):
            output = torch.zeros_like(widen(x))
            for expert in range(gate_up.shape[0]):
                token, slot = torch.where(indices == expert)
                gate, up = (widen(x[token]) @ widen(gate_up[expert]).T).chunk(2, dim=-1)
                y = (F.silu(gate) * up) @ widen(down[expert]).T
                output = output.index_add(0, token, y * weights[token, slot].unsqueeze(-1))
        return output.to(x.dtype)


class GroupedExperts(nn.Module):
    """Token-expert pairs sorted by expert, a slice of them per expert and matrix product.

    Keeps the pre-activations for the backward and nothing else of their size.
    """

    # The slices change with every batch: nothing for a compiler to keep.
    @torch.compiler.disable
    def forward(
        self, x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        x, gate_up, down = autocast(x, gate_up, down)
        rows = _Rows.of(indices, gate_up.shape[0], _ROWS.get(x.dtype, 1))
        with full_precision(x):
            return _GroupedExperts.apply(x, weights, rows, gate_up, down)


# On CPU each new shape of a bf16 product costs a kernel made for it, 0.3 ms and 0.6 MiB, against
# 0.05 ms for the product of 256 rows itself: slices are filled up to sizes that come again.
_ROWS = {torch.bfloat16: 32}


class _Rows(NamedTuple):
    """Pairs by expert, each expert's rows filled up to a multiple with some token of no weight."""

    token: Tensor  # [rows], of each row
    place: Tensor  # [tokens x top_k], row of each pair
    slices: list[tuple[int, slice]]  # (expert, its rows) for every expert that has some

    @classmethod
    def of(cls, indices: Tensor, experts: int, multiple: int) -> "_Rows":
        chosen = indices.flatten()
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=experts)
        filled = (counts + multiple - 1) // multiple * multiple
        shift = (filled - counts).cumsum(0) - (filled - counts)
        rows = torch.arange(len(chosen), device=chosen.device) + shift.repeat_interleave(counts)
        bounds = list(accumulate(filled.tolist(), initial=0))
        slices = [(expert, slice(*at)) for expert, at in enumerate(pairwise(bounds))]
        token = chosen.new_zeros(bounds[-1]).scatter_(0, rows, order // indices.shape[1])
        place = torch.empty_like(order).scatter_(0, order, rows)
        return cls(token, place, [(e, at) for e, at in slices if at.start < at.stop])


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, rows, gate_up, down):
        pairs = x[rows.token]
        hidden = x.new_empty(pairs.shape[0], gate_up.shape[1])
        y = torch.empty_like(pairs)
        for expert, at in rows.slices:
            torch.mm(pairs[at], gate_up[expert].T, out=hidden[at])
            torch.mm(_swiglu(hidden[at]), down[expert].T, out=y[at])
        ctx.save_for_backward(x, weights, rows.token, rows.place, gate_up, down, hidden)
        ctx.slices = rows.slices
        return _sum_over_slots(y, rows.place, weights)

    @staticmethod
    def backward(ctx, grad_output):
        x, weights, token, place, gate_up, down, hidden = ctx.saved_tensors
        pairs, grads = x[token], grad_output[token]
        scale = weights.new_zeros(len(token), 1)
        scale[place] = weights.view(-1, 1)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        grad_pairs, grad_scale = torch.empty_like(pairs), torch.empty_like(scale)
        for expert, at in ctx.slices:
            inner = grads[at] @ down[expert]  # gradient of the activation, before its weight
            activation = _swiglu(hidden[at])
            grad_scale[at] = (widen(inner) * widen(activation)).sum(-1, keepdim=True)
            weighted = (activation * scale[at]).to(x.dtype)
            torch.mm(grads[at].T, weighted, out=grad_down[expert])
            grad_hidden = _swiglu_backward((inner * scale[at]).to(x.dtype), hidden[at])
            torch.mm(grad_hidden.T, pairs[at], out=grad_gate_up[expert])
            torch.mm(grad_hidden, gate_up[expert], out=grad_pairs[at])
        grad_x = _sum_over_slots(grad_pairs, place, torch.ones_like(weights))
        return grad_x, grad_scale[place].view_as(weights), None, grad_gate_up, grad_down


class GroupedMatmulExperts(nn.Module):
    """PyTorch's grouped matrix product, in fp32, bf16 or fp16; on CUDA the host never waits.

    Raises ValueError for a d_model or hidden that is no multiple of 8, as its kernels ask.
    """

    def forward(
        self, x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        _, d_model, hidden = down.shape
        if d_model % 8 or hidden % 8:
            raise ValueError(
                "ops.experts=grouped takes multiples of 8, "
                f"got d_model {d_model} and hidden {hidden}; ops.experts=reference takes any"
            )
        if not len(x):  # the kernel takes no empty matrices
            return x + 0 * (gate_up.sum() + down.sum() + weights.sum()).to(x.dtype)
        x, gate_up, down = autocast(x, gate_up, down)
        chosen, order = indices.flatten().sort(stable=True)
        experts = torch.arange(gate_up.shape[0], device=x.device)
        stops = torch.searchsorted(chosen, experts, right=True).to(torch.int32)
        inverse = _inverse(order)
        copies = x.unsqueeze(1).expand(-1, indices.shape[1], -1).flatten(0, 1)
        pairs = _Permute.apply(copies, order, inverse)
        gate, up = F.grouped_mm(pairs, gate_up.mT, offs=stops).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=stops)
        slots = _Permute.apply(y, inverse, order).view(*indices.shape, -1)
        return (widen(slots) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class _Permute(torch.autograd.Function):
    """x[order]; its gradient gathers by the inverse, where indexing would scatter and add."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


def _sum_over_slots(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """Rows back in the order of tokens, summed over each token's slots: [tokens, d_model]."""
    slots = place.view_as(weights).unbind(1)
    total = torch.zeros(weights.shape[0], y.shape[1], dtype=weights.dtype, device=y.device)
    for slot, weight in zip(slots, weights.unbind(1), strict=True):
        total.addcmul_(y[slot], weight.unsqueeze(-1))
    return total.to(y.dtype)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of [gate, up] from that of silu(gate) * up."""
    gate, up = hidden.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([grad_gate, grad * F.silu(gate)], dim=-1)
