"""Context parallelism for causal convolutions: the few tokens before a cut travel.

A run of tokens that continues a document needs the width - 1 tokens before it, from wherever they
lie: they may be several short fragments on several ranks. All that a rank needs comes in one
message.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.runs import Run, runs
from models.sequence import CausalConv, Fragment, Peers, SequenceInfo, per_layout
from parallel.chains import chains, place_on
from parallel.collectives import Axis
from parallel.plans import Row


class Want(NamedTuple):
    """A token that a rank needs: where it lies, and its slot in the histories of that rank."""

    rank: int
    row: int
    slot: int


class Halo(NamedTuple):
    """What one rank sends, receives and does with it.

    Its heads are the first `reach` tokens of each run that continues a document, in a batch of
    their own. A rank without any has an empty one: its output then depends on the exchange like
    that of the others, and its backward takes part.
    """

    sends: tuple[int, ...]  # local tokens, by the rank that they go to, this one included
    sent: tuple[int, ...]  # to each rank
    received: tuple[int, ...]  # from each rank
    slots: tuple[int, ...]  # in the histories, [heads x reach], of what is received
    tokens: tuple[int, ...]  # local tokens that lie in heads
    places: tuple[int, ...]  # in the heads, [heads x reach], of these
    heads: tuple[Row, ...]
    crosses: bool  # whether anything leaves its rank, on any rank


@per_layout
def wants(peers: Peers, reach: int) -> tuple[tuple[Want, ...], ...]:
    """Of every rank, by the rank that they come from."""
    held = sorted(
        (run.index, rank, run.start)
        for rank, row in enumerate(peers)
        for run in runs(row)
        if run.document in chains(peers)
    )
    needed = []
    for row in peers:
        found = []
        for i, run in enumerate(_continuing(row)):
            for lag in range(1, min(reach, run.position) + 1):
                token = run.index - lag
                index, rank, start = held[bisect_right(held, (token, len(peers))) - 1]
                found.append(Want(rank, start + token - index, (i + 1) * reach - lag))
        needed.append(tuple(sorted(found)))
    return tuple(needed)


@per_layout
def plan_halo(peers: Peers, rank: int, reach: int) -> Halo:
    needed = wants(peers, reach)
    sends = [[want.row for want in found if want.rank == rank] for found in needed]
    continuing = _continuing(peers[rank])
    head = [
        (run.start + i, head * reach + i)
        for head, run in enumerate(continuing)
        for i in range(min(reach, run.stop - run.start))
    ]
    return Halo(
        sends=tuple(row for rows in sends for row in rows),
        sent=tuple(len(rows) for rows in sends),
        received=tuple(sum(w.rank == r for w in needed[rank]) for r in range(len(peers))),
        slots=tuple(want.slot for want in needed[rank]),
        tokens=tuple(token for token, _ in head),
        places=tuple(place for _, place in head),
        heads=tuple((Fragment(reach, run.index, run.position),) for run in continuing)
        or ((Fragment(reach, reach, reach),),),
        crosses=any(want.rank != r for r, found in enumerate(needed) for want in found),
    )


def _continuing(row: Row) -> list[Run]:
    return [run for run in runs(row) if run.position > 0]


class HaloExchange(CausalConv):
    """`op` on the whole local row, while what precedes its runs is on the way; then what this
    makes of their first width - 1 tokens is added, as convolutions are linear.

    Raises ValueError for a history.
    """

    def __init__(self, op: CausalConv, *, axis: Axis) -> None:
        super().__init__()
        self.op, self.axis = op, axis

    # The plans change with every batch: nothing for a compiler to keep.
    @torch.compiler.disable
    def forward(
        self, x: Tensor, weight: Tensor, info: SequenceInfo, *, history: Tensor | None = None
    ) -> Tensor:
        if history is not None:
            raise ValueError(
                "history under context parallelism; a sequence on several ranks starts at its "
                "first token"
            )
        rank, reach = place_on(self.axis, info), weight.shape[1] - 1
        if rank is None or not reach:
            return self.op(x, weight, info)
        halo = plan_halo(info.peers, rank, reach)
        at = _placed(info.peers, rank, reach, x.device)
        exchange = _Exchange(self.axis, halo, at.sends)
        x = _Depart.apply(exchange, x)
        output = self.op(x, weight, info)

        empty = x.new_zeros(len(halo.heads) * reach, x.shape[2])
        before = empty.index_copy(0, at.slots, _Arrive.apply(exchange, x))
        empty, before = (y.unflatten(0, (-1, reach)) for y in (empty, before))
        late = self.op(empty, weight, at.heads, history=before)
        late = late.flatten(0, 1).index_select(0, at.places)
        # Not in place: kernels may return a view, or keep their output for the backward.
        return output.index_add(1, at.tokens, late.unsqueeze(0))


class _Placed(NamedTuple):
    """The same numbers on a device."""

    sends: Tensor
    slots: Tensor
    tokens: Tensor
    places: Tensor
    heads: SequenceInfo


@per_layout
def _placed(peers: Peers, rank: int, reach: int, device: torch.device) -> _Placed:
    halo = plan_halo(peers, rank, reach)
    numbers = halo.sends, halo.slots, halo.tokens, halo.places
    sends, slots, tokens, places = (
        torch.tensor(x, dtype=torch.int64, device=device) for x in numbers
    )
    heads = SequenceInfo.from_fragments(halo.heads, device)
    return _Placed(sends, slots, tokens, places, heads)


class _Exchange:
    """A message forward and its adjoint backward, each started in one call and awaited in
    another, with local work between them."""

    def __init__(self, axis: Axis, halo: Halo, sends: Tensor) -> None:
        self.axis, self.halo, self.sends = axis, halo, sends
        self._wait: Callable[[], Tensor]

    def start(self, rows: Tensor, *, backward: bool = False) -> None:
        if not self.halo.crosses:
            self._wait = lambda: rows
            return
        counts = self.halo.sent, self.halo.received
        direction = "backward" if backward else "forward"
        counts = counts[::-1] if backward else counts
        self._wait = self.axis.exchange(rows, *counts, op="conv", direction=direction).wait

    def wait(self) -> Tensor:
        wait = self._wait
        del self._wait  # with the message
        return wait()


class _Depart(torch.autograd.Function):
    """Returns x as it is and starts the exchange; backward its end."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.start(x[0].index_select(0, exchange.sends))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        # A token may have gone to several ranks: unlike index_add, this sums in a fixed order.
        at = (torch.zeros_like(ctx.exchange.sends), ctx.exchange.sends)
        return None, grad.index_put(at, ctx.exchange.wait(), accumulate=True)


class _Arrive(torch.autograd.Function):
    """The rows that arrive; backward starts the exchange of their gradients. Takes what `_Depart`
    returned, so that its backward is the earlier one."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        ctx.exchange.start(grad, backward=True)
        return None, None
