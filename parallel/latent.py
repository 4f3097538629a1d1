"""Multi-head latent attention over a context axis: latents move, keys and values never do.

A token's latent and shared key are rank + rope values (576 in Kimi Linear, arXiv 2510.26692), its
keys and values 320 per head. Whoever receives latents up-projects them; ring and gather do so
again in the backward pass rather than keep the keys. Gradients of latents are summed and sent in
fp32 or wider. Rotation happens before the op, so schemes need not know about it. Ring attention
is arXiv 2310.01889, heads instead of tokens arXiv 2309.14509.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.ops.latent import MaterialisedLatent, keys_and_values
from models.ops.softmax import merge_
from models.precision import autocast, widen
from models.sequence import LatentAttention, Peers, SequenceInfo, per_layout
from parallel.collectives import Axis, Pending
from parallel.gather import fetch
from parallel.plans import (
    Row,
    add_,
    cut_documents,
    merge_order,
    own_rank,
    rank_on,
    refuse_keys,
    row_info,
    seen,
    take,
    tokens,
    where,
)
from parallel.ring import stops
from parallel.ulysses import HeadExchange

# Attends to latents [tokens, rank + rope] that lie as in the row.
Attend = Callable[[Tensor, Row], None]
# The same backwards: -> the gradient of these latents, fp32 or wider.
AttendBackward = Callable[[Tensor, Row], Tensor]


class LatentScheme(LatentAttention):
    """Latent attention of a local row to latents on all ranks of an axis.

    Raises ValueError for keys that do not sit with the queries, as in decoding.
    """

    def __init__(self, op: LatentAttention, *, axis: Axis) -> None:
        super().__init__()
        self.op, self.axis = op, axis

    # The plans change with every batch: nothing for a compiler to keep.
    @torch.compiler.disable
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
        refuse_keys(self, info, key_info)
        own_rank(info)
        if not cut_documents(info.peers):
            return self.op(q, latent, shared_key, up_weight, info, scale=scale)
        q, latent, shared_key, up_weight = autocast(q, latent, shared_key, up_weight)
        rows = torch.cat([latent, shared_key], dim=-1).squeeze(0)
        return self.attend(q, rows, up_weight, info, scale or q.shape[-1] ** -0.5)

    @abstractmethod
    def attend(
        self, q: Tensor, rows: Tensor, up_weight: Tensor, info: SequenceInfo, scale: float
    ) -> Tensor:
        """`forward` where some document lies on several ranks; rows: [seq, rank + rope]."""


class BlockScheme(LatentScheme):
    """Attends to latents block by block, as they come in."""

    op: MaterialisedLatent

    @property
    def causal(self) -> bool:
        return self.op.softmax.causal

    def attend(self, q, rows, up_weight, info, scale):
        rank_on(self.axis, info)
        return _Attention.apply(self, q, rows, up_weight, info, scale)

    @abstractmethod
    def visit(self, rows: Tensor, info: SequenceInfo, attend: Attend) -> list[Tensor]:
        """Attends to the own rows first, then to others'; -> what the backward pass needs."""

    @abstractmethod
    def visit_backward(
        self, rows: Tensor, kept: list[Tensor], info: SequenceInfo, attend: AttendBackward
    ) -> Tensor:
        """The gradient of the own rows, from the queries of all ranks."""


class LatentRing(BlockScheme):
    """Latents go round the ring, a hop ahead of the computation, no further than they are seen.

    They stay with the last rank that sees them, from where the backward pass takes them, and a
    hop behind them their gradients, back to the owner.
    """

    def visit(self, rows, info, attend):
        rank, kept = own_rank(info), []
        path = stops(info.peers, rank, causal=self.causal)
        others = visible(info.peers, rank, causal=self.causal)
        coming = self._shift(take(rows, path[0].on), tokens(path[1].keys), "forward")
        attend(rows, info.fragments[0])
        for hop, stop in enumerate(path[1:], 1):
            held = coming.wait()
            if hop + 1 < len(path):
                coming = self._shift(take(held, stop.on), tokens(path[hop + 1].keys), "forward")
            if stop.needed:
                keys = others[rank - hop]
                attend(take(held, where(stop.keys, keys)), keys)
            kept.append(take(held, stop.stay))
        return kept

    def visit_backward(self, rows, kept, info, attend):
        rank, gradients = own_rank(info), None
        path = stops(info.peers, rank, causal=self.causal)
        others = visible(info.peers, rank, causal=self.causal)
        held = kept[-1]
        for hop in range(len(path) - 1, 0, -1):
            stop, before = path[hop], path[hop - 1]
            if hop > 1:  # the owner has its latents
                coming = self._shift(held, before.going, "backward")
            total = widen(held[:0]).new_zeros(held.shape)
            if stop.needed:
                keys = others[rank - hop]
                chosen = where(stop.keys, keys)
                add_(total, chosen, attend(take(held, chosen), keys))
            if gradients is not None:
                add_(total, stop.on, gradients.wait())
            gradients = self._shift(total, before.going, "backward")
            if hop > 1:
                held = rows.new_zeros(tokens(before.keys), rows.shape[1])
                add_(held, before.on, coming.wait())
                add_(held, before.stay, kept[hop - 2])
        total = attend(rows, info.fragments[0])
        add_(total, path[0].on, gradients.wait())
        return total

    def _shift(self, x: Tensor, received: int, direction: str) -> Pending:
        step = 1 if direction == "forward" else -1
        return self.axis.shift(x, received, op="latent", direction=direction, step=step)


class LatentGather(BlockScheme):
    """One exchange brings each rank the latents that its queries see, and they are kept."""

    def visit(self, rows, info, attend):
        plan = fetch(info.peers, own_rank(info), causal=self.causal)
        sent = torch.cat([rows[:0], *(rows[part] for part in plan.sent)])
        coming = self._exchange(sent, plan.sent_counts, plan.counts, "forward")
        attend(rows, info.fragments[0])
        latents = coming.wait()
        for block in self._blocks(latents, info):
            attend(*block)
        return [latents]

    def visit_backward(self, rows, kept, info, attend):
        plan = fetch(info.peers, own_rank(info), causal=self.causal)
        grads = [attend(*block) for block in self._blocks(kept[0], info)]
        sent = torch.cat([widen(rows[:0]), *grads])
        coming = self._exchange(sent, plan.counts, plan.sent_counts, "backward")
        total = attend(rows, info.fragments[0])
        add_(total, plan.sent, coming.wait())
        return total

    def _blocks(self, latents: Tensor, info: SequenceInfo) -> list[tuple[Tensor, Row]]:
        """One per rank, so that the keys of one rank exist at a time."""
        every = visible(info.peers, own_rank(info), causal=self.causal)
        rows = [row for row in every if row]
        return [*zip(latents.split([tokens(row) for row in rows]), rows, strict=True)]

    def _exchange(
        self, x: Tensor, sent: Sequence[int], received: Sequence[int], direction: str
    ) -> Pending:
        return self.axis.exchange(x, sent, received, op="latent", direction=direction)


class LatentUlysses(LatentScheme):
    """All latents of the axis for a share of the heads: only the own heads are up-projected, so
    that nothing is computed twice.

    op: a local op, or a scheme over the groups that the axes of this kind form. The weight
    gradient is zero for other heads; the sum over the context ranks completes it.
    """

    def attend(self, q, rows, up_weight, info, scale):
        exchange = HeadExchange(self.axis, info, heads=q.shape[2], op="latent")
        exchange.check_inner(self.op, LatentScheme)
        order = merge_order(info.peers, self.axis.ranks, own_rank(info), rows.device)
        latents = _AllGather.apply(rows, self.axis, *order).unsqueeze(0)
        rank = up_weight.shape[-1]
        (own_q,) = exchange.to_heads(q)
        own_weight = up_weight[exchange.own.start : exchange.own.stop]
        latent, shared_key = latents[..., :rank], latents[..., rank:]
        output = self.op(own_q, latent, shared_key, own_weight, exchange.info, scale=scale)
        return exchange.to_tokens(output)


class _AllGather(torch.autograd.Function):
    """[seq, ...] -> [merged seq, ...]; `sort` and `unsort` as from `merge_order`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, axis: Axis, sort: Tensor, unsort: Tensor):
        ctx.axis, ctx.unsort = axis, unsort
        gathered = axis.gather(rows, op="latent", direction="forward").wait()
        return gathered.index_select(0, sort)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        parts = widen(grad).index_select(0, ctx.unsort)
        total = ctx.axis.sum_scatter(parts, op="latent", direction="backward").wait()
        return total.to(grad.dtype), None, None, None


class _Attention(torch.autograd.Function):
    """q [1, seq, heads, nope + rope] on the latents of all ranks, rows being the own ones."""

    @staticmethod
    def forward(ctx: Any, scheme: BlockScheme, q, rows, up_weight, info, scale):
        key_dims = q.shape[-1] - (rows.shape[1] - up_weight.shape[2])  # without the shared ones
        accumulators = widen(q[:0])
        output = accumulators.new_zeros(*q.shape[:-1], up_weight.shape[1] - key_dims)
        lse = accumulators.new_full(q.shape[:-1], -math.inf)

        def attend(rows: Tensor, row: Row) -> None:
            k, v = _expand(rows, up_weight, key_dims)
            key_info = row_info(info.peers, row, rows.device)
            merge_(output, lse, *scheme.op.softmax.block(q, k, v, info, key_info, scale=scale))

        kept = scheme.visit(rows, info, attend)
        output = output.to(q.dtype)
        ctx.save_for_backward(q, rows, up_weight, output, lse, *kept)
        ctx.scheme, ctx.info, ctx.scale, ctx.key_dims = scheme, info, scale, key_dims
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, rows, up_weight, output, lse, *kept = ctx.saved_tensors
        softmax, info, scale = ctx.scheme.op.softmax, ctx.info, ctx.scale
        grad_q, grad_weight = (widen(x[:0]).new_zeros(x.shape) for x in (q, up_weight))

        def attend(rows: Tensor, row: Row) -> Tensor:
            leaves = rows.detach().requires_grad_(), up_weight.detach().requires_grad_()
            with torch.enable_grad():
                k, v = _expand(*leaves, ctx.key_dims)
            key_info = row_info(info.peers, row, rows.device)
            block = q, k.detach(), v.detach(), output, lse, info, key_info
            part, *grads = softmax.block_backward(grad, *block, scale=scale)
            grad_q.add_(part)
            grad_rows, part = torch.autograd.grad((k, v), leaves, grads)
            grad_weight.add_(part)
            return widen(grad_rows)

        grad_rows = ctx.scheme.visit_backward(rows, kept, info, attend)
        totals = zip((grad_q, grad_rows, grad_weight), (q, rows, up_weight), strict=True)
        return None, *(total.to(x.dtype) for total, x in totals), None, None


def _expand(rows: Tensor, up_weight: Tensor, key_dims: int) -> tuple[Tensor, Tensor]:
    """Keys and values of rows [tokens, rank + rope], as a batch of one."""
    rank = up_weight.shape[-1]
    return keys_and_values(rows[None, :, :rank], rows[None, :, rank:], up_weight, key_dims)


@per_layout
def visible(peers: Peers, rank: int, *, causal: bool) -> tuple[Row, ...]:
    """What the queries of a rank see of the row of each other; nothing at its own place."""
    return tuple(
        seen(row, peers[rank], causal=causal) if r != rank else () for r, row in enumerate(peers)
    )
