"""Attention to gathered keys: each rank fetches the remote keys and values that its queries see.

The all-gather of Llama 3's context parallelism, arXiv 2407.21783, as an all-to-all of needed rows
only. Key heads go in groups, the next under way while one is computed; in the backward so do the
gradients of the group before.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.precision import widen
from models.sequence import Peers, SequenceInfo, SoftmaxAttention, per_layout
from parallel.collectives import Axis, Pending
from parallel.plans import Row, add_, own_rank, rank_on, seen, take, tokens, where
from parallel.softmax import Gradients, Merging, Options, SoftmaxScheme, pack, unpack


class Fetch(NamedTuple):
    """Which rows a rank sends and receives."""

    sent: tuple[slice, ...]  # of the own row, for rank 0, then for rank 1, ...; some several times
    sent_counts: tuple[int, ...]  # by rank
    keys: Row  # received
    counts: tuple[int, ...]  # of them, by rank


@per_layout
def fetch(peers: Peers, rank: int, *, causal: bool) -> Fetch:
    nothing: Row = ()
    others = [row if r != rank else nothing for r, row in enumerate(peers)]
    read = [seen(peers[rank], row, causal=causal) for row in others]
    keys = [seen(row, peers[rank], causal=causal) for row in others]
    return Fetch(
        sent=tuple(part for chosen in read for part in where(peers[rank], chosen)),
        sent_counts=tuple(map(tokens, read)),
        keys=tuple(key for chosen in keys for key in chosen),
        counts=tuple(map(tokens, keys)),
    )


class GatherAttention(SoftmaxScheme):
    """`op` on the own keys, then on all the others that the own queries see.

    head_groups: how many messages the key heads are cut into, at most one per head; more need less
    memory, for two groups of remote keys and values live at once.
    Raises ValueError for head_groups below 1.
    """

    def __init__(self, op: SoftmaxAttention, *, axis: Axis, head_groups: int = 4) -> None:
        super().__init__(op, axis=axis)
        if head_groups < 1:
            raise ValueError(f"head_groups is {head_groups}; it must be at least 1")
        self.head_groups = head_groups

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, options: Options
    ) -> Tensor:
        rank_on(self.axis, info)
        groups = _groups(q.shape[2], k.shape[2], self.head_groups)
        return _Gather.apply(self.op, self.axis, groups, q, k, v, info, options)


class HeadGroup(NamedTuple):
    q: slice
    kv: slice


def _groups(heads: int, kv_heads: int, groups: int) -> list[HeadGroup]:
    """The key heads in near-equal groups, with the query heads that read them."""
    groups = min(groups, kv_heads)
    bounds = [kv_heads * i // groups for i in range(groups + 1)]
    each = heads // kv_heads
    return [
        HeadGroup(slice(start * each, stop * each), slice(start, stop))
        for start, stop in pairwise(bounds)
    ]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: SoftmaxAttention, axis: Axis, groups, q, k, v, info, options):
        plan = fetch(info.peers, own_rank(info), causal=op.causal)
        results = []
        arriving = _fetch(axis, plan, k, v, groups[0], "forward")
        for group, following in pairwise([*groups, None]):
            current = arriving
            if following is not None:
                arriving = _fetch(axis, plan, k, v, following, "forward")
            keys, values = k[:, :, group.kv], v[:, :, group.kv]
            attention = Merging(op, q[:, :, group.q], keys, values, info, options)
            remote = current.wait()
            if plan.keys:
                attention.add(*unpack(remote, k, v), plan.keys)
            results.append(attention.finish())
        output, lse = (torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.op, ctx.axis, ctx.groups, ctx.info, ctx.options = op, axis, groups, info, options
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, k, v, output, lse = ctx.saved_tensors
        axis, groups = ctx.axis, ctx.groups
        plan = fetch(ctx.info.peers, own_rank(ctx.info), causal=ctx.op.causal)
        grads_q: list[Tensor] = []
        grads_own: list[Tensor] = []
        arriving = _fetch(axis, plan, k, v, groups[0], "backward")
        returning: Pending | None = None
        for group, following in pairwise([*groups, None]):
            current = arriving
            if following is not None:
                arriving = _fetch(axis, plan, k, v, following, "backward")
            saved = tuple(x[:, :, group.q] for x in (grad, q, output, lse))
            grads, remote = Gradients(ctx.op, saved, ctx.info, ctx.options), current.wait()
            grad_remote = widen(remote)  # of no rows if there are no keys
            if plan.keys:
                grad_remote = grads.of(*unpack(remote, k, v), plan.keys)
            if returning is not None:
                add_(grads_own[-1], plan.sent, returning.wait())
            # On its way while the own keys are computed and the next group's remote ones.
            returning = _exchange(axis, grad_remote, plan.counts, plan.sent_counts, "backward")
            grad_q, grad_own = grads.own(k[:, :, group.kv], v[:, :, group.kv])
            grads_q.append(grad_q.to(q.dtype))
            grads_own.append(grad_own)
        if returning is not None:
            add_(grads_own[-1], plan.sent, returning.wait())
        whole = torch.cat(grads_q, dim=2), *unpack(torch.cat(grads_own, dim=1), k, v)
        return None, None, None, *(x.to(q.dtype) for x in whole), None, None


def _fetch(
    axis: Axis, plan: Fetch, k: Tensor, v: Tensor, group: HeadGroup, direction: str
) -> Pending:
    """[tokens of plan.keys, key heads of the group, dim + v_dim]."""
    sent = pack(*(take(x[0, :, group.kv], plan.sent) for x in (k, v)))
    return _exchange(axis, sent, plan.sent_counts, plan.counts, direction)


def _exchange(
    axis: Axis, x: Tensor, sent: tuple[int, ...], received: tuple[int, ...], direction: str
) -> Pending:
    return axis.exchange(x, sent, received, op="softmax", direction=direction)
