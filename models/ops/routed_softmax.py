"""Softmax attention to the own chunk and to earlier chunks that a router kept.

NAtS-L, arXiv 2602.03681. `DenseRoutedAttention` is the definition; `TiledRoutedAttention` copies
the kept chunks of every key head together and multiplies nothing else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.ops.routed import ABSENT, RoutedAttention, RoutedKeys, keys_and_values
from models.ops.routed_blocks import (
    Grads,
    Plan,
    Rows,
    Sight,
    block,
    block_backward,
    own_backward,
    own_chunks,
)
from models.ops.routed_grid import ChunkGrid, chunk_grid
from models.ops.softmax import merge_
from models.precision import autocast, full_precision, widen
from models.sequence import SequenceInfo


class DenseRoutedAttention(RoutedAttention):
    """The definition, with a score matrix per head, in fp32 or wider; keep may be any number from
    0 to 1."""

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
        dtype = q.dtype
        with full_precision(q):
            q, *kv = widen(q), *map(widen, keys_and_values(k, v))
            gate, shown = self._gate(widen(keep), info)  # [B, kv heads, S, key S]
            if past is not None:
                kv = [
                    torch.cat((_tokens(widen(x)), y), 1) for x, y in zip(past.kv, kv, strict=True)
                ]
                earlier = self._past(past, info)
                gate = torch.cat((earlier.to(gate.dtype), gate), dim=-1)
                shown = torch.cat((earlier, shown), dim=-1)
            k, v = kv[0], kv[-1]
            queries = q.unflatten(2, (k.shape[2], -1)) * (scale or q.shape[-1] ** -0.5)
            scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, k)
            scores = scores.masked_fill(~shown.unsqueeze(2), -torch.inf)
            top = scores.detach().amax(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0)  # of a query that sees no key
            weights = (scores - top).exp() * gate.unsqueeze(2)
            total, none = weights.sum(-1, keepdim=True), (gate == 0).all(-1)[:, :, None, :, None]
            weights = (weights / total.masked_fill(none, 1)).masked_fill(none, 0)
            output = torch.einsum("bhgqk,bkhd->bqhgd", weights, v).flatten(2, 3)
        return output.to(dtype)

    def _gate(self, keep: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
        """What multiplies exp(score), and where that has a value or a gradient."""
        document, chunk = info.index - info.positions, info.positions // self.chunk
        same = document.unsqueeze(2) == document.unsqueeze(1)
        own = same & (chunk.unsqueeze(2) == chunk.unsqueeze(1)) & self.own
        own &= info.index.unsqueeze(2) >= info.index.unsqueeze(1)
        earlier = same & (chunk.unsqueeze(2) > chunk.unsqueeze(1))
        gates = keep.transpose(1, 2).unsqueeze(2)  # [B, kv heads, 1, S]
        shown = own.unsqueeze(1) | (earlier.unsqueeze(1) & ((gates > 0) | self.counterfactual))
        return torch.where(own.unsqueeze(1), 1, gates) * shown, shown

    def _past(self, past: RoutedKeys, info: SequenceInfo) -> Tensor:
        """[B, kv heads, S, slots x C] bool."""
        index = past.start.unsqueeze(2)
        document = (info.index - info.positions)[:, None, :, None]
        start = (info.index - info.positions % self.chunk)[:, None, :, None]
        seen = (document <= index) & (index < start)
        return seen.repeat_interleave(self.chunk, dim=-1)


def _tokens(x: Tensor) -> Tensor:
    """[batch, kv_heads, slots, C, dim] -> [batch, slots x C, kv_heads, dim]."""
    return x.flatten(2, 3).transpose(1, 2)


class TiledRoutedAttention(RoutedAttention):
    """Own chunks as batched squares; kept chunks sorted together, by key head, in query tiles.

    Memory is linear in tokens, time follows the kept share. Waits for the device once, for the
    sizes, and once more in a counterfactual backward, which also goes over all chunks not kept.
    """

    # The sizes change with every batch: nothing for a compiler to keep.
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
        q, *kv = autocast(q, *keys_and_values(k, v))
        grid = chunk_grid(info, self.chunk)
        with full_precision(q):
            output = _Routed.apply(grid, self, past, *rows_of(q, kv, keep, grid, scale))
            return tokens_of(output, q, grid)


def rows_of(
    q: Tensor, kv: Sequence[Tensor], keep: Tensor, grid: ChunkGrid, scale: float | None
) -> Rows:
    """Queries, gates [R, N], keys and values as rows: queries scaled, in fp32 or wider."""
    queries = query_rows(grid.cut(widen(q) * (scale or q.shape[-1] ** -0.5)), kv[0].shape[2])
    return queries, keep_rows(grid.cut(keep)[:, :, 0]), *(key_rows(grid.cut(x)) for x in kv)


def tokens_of(output: Tensor, q: Tensor, grid: ChunkGrid) -> Tensor:
    """Output in rows -> [batch, seq, heads, v_dim], in the dtype of q."""
    return grid.join(from_query_rows(output, q.shape[0], grid.chunk)).to(q.dtype)


def query_rows(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, N, C, heads, dim] -> [R, N, P, dim] of `routed_blocks`."""
    x = x.unflatten(3, (kv_heads, -1)).permute(0, 3, 1, 2, 4, 5)
    return x.flatten(3, 4).flatten(0, 1)


def from_query_rows(x: Tensor, batch: int, chunk: int) -> Tensor:
    """[R, N, P, dim] -> [batch, N, C, heads, dim]."""
    x = x.unflatten(2, (chunk, -1)).unflatten(0, (batch, -1))
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def key_rows(x: Tensor) -> Tensor:
    """[batch, N, C, kv_heads, dim] -> [R, N, C, dim]."""
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1)


def keep_rows(x: Tensor) -> Tensor:
    """[batch, N, kv_heads] -> [R, N]."""
    return x.transpose(1, 2).flatten(0, 1)


def sight(grid: ChunkGrid, kv_heads: int) -> Sight:
    """What the queries of a row may see beside their own chunks."""
    bounds = (x.repeat_interleave(kv_heads, dim=0) for x in (grid.document, grid.start))
    return Sight(*bounds)


def kept_index(kept: Tensor, grid: ChunkGrid) -> Tensor:
    """[R, N] index of the chunks that are kept and have successors; kept: [R, N] bool."""
    index = grid.start.masked_fill(~grid.whole, ABSENT)
    return index.repeat_interleave(len(kept) // len(index), dim=0).masked_fill(~kept, ABSENT)


def remember(
    past: RoutedKeys | None, kv: Sequence[Tensor], keep: Tensor, grid: ChunkGrid
) -> RoutedKeys:
    """`past` and the chunks of [batch, seq, kv_heads, ...] that are whole and kept, in as many
    slots as the fullest head needs; keep: [batch, chunks, kv_heads]."""
    rows = [kept_index(keep_rows(keep) > 0, grid), *(key_rows(grid.cut(x)) for x in kv)]
    start, *chunks = (x.unflatten(0, (len(keep), -1)) for x in rows)
    if past is not None:
        pairs = zip((past.start, *past.kv), (start, *chunks), strict=True)
        start, *chunks = (torch.cat(pair, dim=2) for pair in pairs)
    slots = int((start != ABSENT).sum(-1).amax())
    start, order = start.sort(dim=-1)
    order = order[..., :slots, None, None]
    chunks = [x.gather(2, order.expand(-1, -1, -1, *x.shape[3:])) for x in chunks]
    return RoutedKeys(tuple(chunks), start[..., :slots].clone())


class Attending:
    """Attention of rows of queries to their own chunks, if `own`, to which others are added.

    q, kv: in rows, in fp32 or wider.
    """

    def __init__(self, q: Tensor, kv: Rows, grid: ChunkGrid, *, own: bool) -> None:
        self.q, self.sight = q, sight(grid, len(q) // grid.shape[0])
        if own:
            self.output, self.lse = own_chunks(q, kv)
        else:
            self.output = q.new_zeros(*q.shape[:3], kv[-1].shape[-1])
            self.lse = q.new_full(q.shape[:3], -torch.inf)

    def add(self, kv: Rows, index: Tensor) -> Plan:
        """Earlier chunks at these indices [R, M]; -> who sees them, for the backward."""
        plan = Plan.make(index, self.sight, kv[0].shape[2], self.q.shape[2])
        if plan.groups:
            merge_(self.output, self.lse, *block(self.q, kv, plan))
        return plan

    def finish(self) -> tuple[Tensor, Tensor]:
        """Output and lse; the latter is inf where a query sees no key, and so has no gradient."""
        return self.output, self.lse.masked_fill(self.lse == -torch.inf, torch.inf)


class Gradients:
    """Gradients of q and of chunks of keys, under what `Attending` gave; all in rows."""

    def __init__(self, grad: Tensor, q: Tensor, output: Tensor, lse: Tensor) -> None:
        self.grad, self.q, self.lse = grad, q, lse
        self.delta = (grad * output).sum(-1)

    def of(self, kv: Rows, plan: Plan) -> Grads:
        return block_backward(self.grad, self.q, kv, self.lse, self.delta, plan)

    def own(self, kv: Rows, *, own: bool) -> Grads:
        """Due to own chunks, if queries see them."""
        if not own:
            return Grads.zeros(self.q, kv)
        return own_backward(self.grad, self.q, kv, self.lse, self.delta)

    def add_local(
        self,
        total: Grads,
        kv: Rows,
        gates: Tensor,
        grid: ChunkGrid,
        plan: Plan,
        *,
        counterfactual: bool,
    ) -> None:
        """Adds those due to the earlier chunks of this row; plan: of those that are kept."""
        grads = self.of(kv, plan)
        total.q.add_(grads.q)
        for so_far, more in zip(total.of_chunks, grads.of_chunks, strict=True):
            so_far += more
        if counterfactual:
            view = sight(grid, len(gates) // grid.shape[0])
            index = kept_index(gates <= 0, grid)
            dropped = Plan.make(index, view, kv[0].shape[2], self.q.shape[2])
            total.gate.add_(self.of(kv, dropped).gate)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        grid: ChunkGrid,
        op: RoutedAttention,
        past: RoutedKeys | None,
        q: Tensor,
        gates: Tensor,
        *kv: Tensor,
    ) -> Tensor:
        wide = tuple(map(widen, kv))
        attention = Attending(q, wide, grid, own=op.own)
        plan = attention.add(wide, kept_index(gates > 0, grid))
        if past is not None:
            earlier = tuple(widen(x.flatten(0, 1)) for x in past.kv)
            attention.add(earlier, past.start.flatten(0, 1))
        output, lse = attention.finish()
        ctx.save_for_backward(output, lse, q, gates, *kv)
        ctx.grid, ctx.plan, ctx.op = grid, plan, op
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        output, lse, q, gates, *kv = ctx.saved_tensors
        ctx.op.pairs += ctx.plan.pairs
        with full_precision(grad):
            gradients, wide = Gradients(grad, q, output, lse), tuple(map(widen, kv))
            total = gradients.own(wide, own=ctx.op.own)
            counterfactual = ctx.op.counterfactual
            gradients.add_local(
                total, wide, gates, ctx.grid, ctx.plan, counterfactual=counterfactual
            )
        return None, None, None, *total.like(q, gates, *kv)
