"""Ring attention, arXiv 2310.01889: keys and values go round, queries stay.

While a block is computed, the next one is on its way. A row of keys goes no further than the last
rank that sees it, and stays there for the backward, which walks the way back: keys and values from
where they stayed to their first reader, and their gradients one hop behind them to the owner.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.precision import widen
from models.sequence import Fragment, Peers, SequenceInfo, SoftmaxAttention, per_layout
from parallel.collectives import Axis, Pending
from parallel.plans import Row, add_, own_rank, put_, rank_on, seen, take, tokens, where
from parallel.softmax import Gradients, Merging, Options, SoftmaxScheme, pack, unpack


class Stop(NamedTuple):
    """What a rank holds after some hops: keys of one other rank, in that rank's order."""

    keys: Row
    needed: bool  # own queries see some of them
    on: tuple[slice, ...]  # those that go on to the next rank
    stay: tuple[slice, ...]  # the others

    @property
    def going(self) -> int:
        """Tokens that go on."""
        return sum(part.stop - part.start for part in self.on)


@per_layout
def stops(peers: Peers, rank: int, *, causal: bool) -> tuple[Stop, ...]:
    """What a rank holds after each hop, those of rank - hop; at first the own ones."""
    found = []
    for hop in range(len(peers)):
        owner = (rank - hop) % len(peers)
        reach = _reach(peers, owner, causal=causal)
        keys = tuple(key for key in peers[owner] if reach.get(key, 0) >= hop)
        on = where(keys, {key for key in keys if reach.get(key, 0) > hop})
        stay = where(keys, {key for key in keys if reach.get(key, 0) == hop})
        needed = hop > 0 and bool(seen(keys, peers[rank], causal=causal))
        found.append(Stop(keys, needed, on, stay))
    return tuple(found)


@per_layout
def _reach(peers: Peers, owner: int, *, causal: bool) -> dict[Fragment, int]:
    """How many hops a fragment of the owner travels to the last rank that sees it."""
    ranks = len(peers)
    readers = {hop: peers[(owner + hop) % ranks] for hop in range(1, ranks)}
    return {
        key: hop
        for hop, reader in readers.items()
        for key in seen(peers[owner], reader, causal=causal)
    }


class RingAttention(SoftmaxScheme):
    """`op` on the own keys, then on those of one rank behind after the other.

    Sums over ranks are fp32 or wider. At most two buffers of moved keys and values live at once,
    besides the rows that stay for the backward: over ranks, on average no more than the own ones.
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, options: Options
    ) -> Tensor:
        rank_on(self.axis, info)
        return _Ring.apply(self.op, self.axis, q, k, v, info, options)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: SoftmaxAttention, axis: Axis, q, k, v, info, options):
        path = stops(info.peers, own_rank(info), causal=op.causal)
        own = (take(x[0], path[0].on) for x in (k, v))
        coming = _shift(axis, pack(*own), tokens(path[1].keys), "forward")
        attention = Merging(op, q, k, v, info, options)
        kept = []
        for hop, stop in enumerate(path[1:], 1):
            held = coming.wait()
            if hop + 1 < len(path):
                coming = _shift(axis, take(held, stop.on), tokens(path[hop + 1].keys), "forward")
            if stop.needed:
                attention.add(*unpack(held, k, v), stop.keys)
            kept.append(take(held, stop.stay))
        output, lse = attention.finish()
        ctx.save_for_backward(q, k, v, output, lse, *kept)
        ctx.op, ctx.axis, ctx.info, ctx.options = op, axis, info, options
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        q, k, v, output, lse, *kept = ctx.saved_tensors
        path = stops(ctx.info.peers, own_rank(ctx.info), causal=ctx.op.causal)
        grads = Gradients(ctx.op, (grad, q, output, lse), ctx.info, ctx.options)
        returned: Pending | None = None
        gradients: Pending | None = None
        for hop in range(len(path) - 1, 0, -1):
            stop, arriving, stayed = path[hop], path[hop - 1].going, kept[hop - 1]
            held = stayed if returned is None else _join(returned.wait(), stayed, stop)
            if hop > 1:
                returned = _shift(ctx.axis, held, arriving, "backward")
            if stop.needed:
                grad_held = grads.of(*unpack(held, k, v), stop.keys)
            else:
                grad_held = torch.zeros_like(widen(held))
            if gradients is not None:
                add_(grad_held, stop.on, gradients.wait())
            gradients = _shift(ctx.axis, grad_held, arriving, "backward")
        grad_q, grad_own = grads.own(k, v)
        if gradients is not None:
            add_(grad_own, path[0].on, gradients.wait())
        grad_k, grad_v = unpack(grad_own, k, v)
        return None, None, grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _shift(axis: Axis, x: Tensor, rows: int, direction: str) -> Pending:
    """One rank on, in the backward one back."""
    step = 1 if direction == "forward" else -1
    return axis.shift(x, rows, op="softmax", direction=direction, step=step)


def _join(on: Tensor, stayed: Tensor, stop: Stop) -> Tensor:
    """The keys of a stop from those that went on and those that stayed."""
    if not len(stayed):
        return on
    whole = on.new_empty(len(on) + len(stayed), *on.shape[1:])
    put_(whole, stop.on, on)
    put_(whole, stop.stay, stayed)
    return whole
