"""Routed attention over a context axis: only the chunks that a head keeps travel.

NAtS-L, arXiv 2602.03681. Own chunks are attended to where they lie, as runs of a row start with a
chunk. Of the others a rank gets, head by head, those that are kept and that a query here may see,
from all ranks at once (gather) or from one after the other (ring); and again in the backward,
rather than keep them. Gradients of keys, values and gates go back in fp32 or wider.

Counterfactual gradients need every chunk that is not kept, too: in the backward alone they travel
a way of their own, on which only the gradients of gates go back.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.ops.routed import RoutedAttention, RoutedKeys, keys_and_values
from models.ops.routed_blocks import Grads, Plan
from models.ops.routed_grid import chunk_grid
from models.ops.routed_softmax import (
    Attending,
    Gradients,
    TiledRoutedAttention,
    kept_index,
    rows_of,
    sight,
    tokens_of,
)
from models.precision import autocast, full_precision, widen
from models.sequence import SequenceInfo
from parallel.collectives import Axis, Pending
from parallel.parcels import OP, Choice, Parcels, loans
from parallel.plans import cut_documents, own_rank, rank_on
from parallel.ulysses import HeadExchange, repeat_heads, repeats


class RoutedScheme(RoutedAttention):
    """Attention of a local row to its own chunks and to the kept ones on all ranks of an axis.

    Raises ValueError for kept chunks of the past, which only decoding has.
    """

    def __init__(self, op: RoutedAttention, *, axis: Axis) -> None:
        super().__init__(chunk=op.chunk, own=op.own, counterfactual=op.counterfactual)
        self.op, self.axis = op, axis

    # The plans change with every batch: nothing for a compiler to keep.
    @torch.compiler.disable
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        keep: Tensor,
        info: SequenceInfo,
        *,
        scale: float | None = None,
        past: RoutedKeys | None = None,
    ) -> Tensor:
        if past is not None:
            raise ValueError(
                f"{type(self).__name__} got past chunks; parallel=single takes them, in decoding"
            )
        own_rank(info)
        if not cut_documents(info.peers):
            return self.op(q, k, v, keep, info, scale=scale)
        q, *kv = autocast(q, *keys_and_values(k, v))
        return self.attend(q, kv, keep, info, scale)

    @abstractmethod
    def attend(
        self, q: Tensor, kv: list[Tensor], keep: Tensor, info: SequenceInfo, scale: float | None
    ) -> Tensor:
        """`forward` where some document lies on several ranks; kv: `keys_and_values`."""


class ChunkScheme(RoutedScheme):
    """Moves kept chunks, in rounds; while one is computed the next one is on its way.

    Waits for the device once for the sizes of all parcels, and then as `op` does for its plans.
    Raises ValueError for an `op` that is not made of the blocks of which this is made.
    """

    def __init__(self, op: RoutedAttention, *, axis: Axis) -> None:
        if not isinstance(op, TiledRoutedAttention):
            raise ValueError(
                f"{type(op).__name__} has no blocks for {type(self).__name__}; allowed: "
                "ops.routed_attention=tiled, or parallel.softmax=ulysses"
            )
        super().__init__(op, axis=axis)

    def attend(self, q, kv, keep, info, scale):
        rank_on(self.axis, info)
        grid = chunk_grid(info, self.chunk)
        with full_precision(q):
            output = _Attention.apply(self, info, *rows_of(q, kv, keep, grid, scale))
            return tokens_of(output, q, grid)

    @abstractmethod
    def rounds(self) -> list[tuple[range, range]]:
        """Ranks that get parcels from this one, and ranks from which it gets some."""


class RoutedGather(ChunkScheme):
    """Everything in one message to each rank."""

    def rounds(self):
        return [(range(self.axis.ranks), range(self.axis.ranks))]


class RoutedRing(ChunkScheme):
    """From one rank in a round, first from that before this one: chunks of at most two ranks live
    at once. They come straight from their owner, not by way of ranks that see others of them."""

    def rounds(self):
        rank, ranks = self.axis.rank, self.axis.ranks
        return [(_only((rank + i) % ranks), _only((rank - i) % ranks)) for i in range(1, ranks)]


def _only(rank: int) -> range:
    return range(rank, rank + 1)


class Way(NamedTuple):
    """Parcels of a round, and who sees what comes; not kept: for the gradients of gates only."""

    parcels: Parcels
    plan: Plan
    kept: bool = True


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scheme: ChunkScheme, info: SequenceInfo, q: Tensor, gates: Tensor, *kv: Tensor
    ) -> Tensor:
        axis, grid = scheme.axis, chunk_grid(info, scheme.chunk)
        plan = loans(info.peers, axis.rank, scheme.chunk, q.device)
        kept = gates > 0
        lent = kept[:, plan.columns].T
        coming = axis.exchange(lent.byte(), plan.lent, plan.borrowed, op=OP, direction="forward")
        wide = tuple(map(widen, kv))
        attention = Attending(q, wide, grid, own=scheme.own)
        choice = Choice.of(plan, lent, coming.wait() > 0)
        parcels = _in_rounds(scheme, choice, kv[0])
        coming = parcels[0].fetch(*kv, direction="forward")
        own_plan = attention.add(wide, kept_index(kept, grid))
        ways = []
        for current, following in zip(parcels, [*parcels[1:], None], strict=True):
            message = coming.wait()
            if following is not None:
                coming = following.fetch(*kv, direction="forward")
            borrowed = tuple(map(widen, current.unpack(message, *kv)))
            ways.append(Way(current, attention.add(borrowed, current.index)))
        output, lse = attention.finish()
        ctx.save_for_backward(output, lse, q, gates, *kv)
        ctx.scheme, ctx.grid, ctx.plan, ctx.ways, ctx.choice = scheme, grid, own_plan, ways, choice
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        output, lse, q, gates, *kv = ctx.saved_tensors
        ctx.scheme.pairs += ctx.plan.pairs + sum(way.plan.pairs for way in ctx.ways)
        with full_precision(grad):
            gradients = Gradients(grad, q, output, lse)
            ways = [*ctx.ways, *_counterfactual(ctx, q, kv[0])]
            coming = ways[0].parcels.fetch(*kv, direction="backward")
            local, scheme = tuple(map(widen, kv)), ctx.scheme
            total = gradients.own(local, own=scheme.own)
            returning: tuple[Way, Pending] | None = None
            for way, following in zip(ways, [*ways[1:], None], strict=True):
                message = coming.wait()
                if following is not None:
                    coming = following.parcels.fetch(*kv, direction="backward")
                borrowed = tuple(map(widen, way.parcels.unpack(message, *kv)))
                grads = gradients.of(borrowed, way.plan)
                if way.kept:
                    total.q.add_(grads.q)
                if returning is not None:
                    _add_returned(*returning, total)
                returning = way, way.parcels.give_back(*_returned(way, grads))
            # While the last gradients return.
            gradients.add_local(
                total, local, gates, ctx.grid, ctx.plan, counterfactual=scheme.counterfactual
            )
            if returning is not None:
                _add_returned(*returning, total)
        return None, None, *total.like(q, gates, *kv)


def _in_rounds(scheme: ChunkScheme, choice: Choice, k: Tensor) -> list[Parcels]:
    return [choice.parcels(scheme.axis, k.shape[1], *ranks) for ranks in scheme.rounds()]


def _counterfactual(ctx: Any, q: Tensor, k: Tensor) -> Iterator[Way]:
    if ctx.scheme.counterfactual:
        view = sight(ctx.grid, len(q) // ctx.grid.shape[0])
        for parcels in _in_rounds(ctx.scheme, ctx.choice.others(), k):
            plan = Plan.make(parcels.index, view, k.shape[2], q.shape[2])
            yield Way(parcels, plan, kept=False)


def _returned(way: Way, grads: Grads) -> tuple[Tensor, ...]:
    """Those of the gradients whose owner is the owner of the chunks."""
    return grads.of_chunks if way.kept else (grads.gate,)


def _add_returned(way: Way, returning: Pending, total: Grads) -> None:
    way.parcels.add_returned(returning.wait(), *_returned(way, total))


class RoutedUlysses(RoutedScheme):
    """`op` on all tokens of the axis for a share of the heads.

    op: a local one, or a gather or ring scheme over the ranks that hold the same heads.
    """

    def attend(self, q, kv, keep, info, scale):
        exchange = HeadExchange(self.axis, info, heads=q.shape[2], op=OP)
        exchange.check_inner(self.op, RoutedScheme)
        counts = repeats(exchange.own, q.shape[2] // kv[0].shape[2])
        q, keep, *kv = exchange.to_heads(q, keep.unsqueeze(-1), *kv)
        keep, k, *v = (repeat_heads(x, counts) for x in (keep, *kv))
        output = self.op(q, k, v[0] if v else None, keep.squeeze(-1), exchange.info, scale=scale)
        return exchange.to_tokens(output)
