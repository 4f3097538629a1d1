"""The chunks of routed documents: where they lie in a row, and tokens laid out by them.

A document is cut into chunks of C tokens from its start on; the last one may be shorter. Rows are
re-laid so that every chunk has C slots of its own: [batch, seq, ...] <-> [batch, chunks, C, ...].
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.routed import ABSENT
from models.ops.runs import runs
from models.precision import widen
from models.sequence import SequenceInfo, per_layout


@dataclass(frozen=True, eq=False)
class ChunkGrid:
    """The chunks of every row, in its order; rows of fewer chunks end with absent ones."""

    chunk: int  # C
    seq: int
    slots: Tensor | None  # [batch x seq], of each token in batch x chunks x C; None: in order
    # [batch, chunks] global index of the first token and of the document's start; ABSENT for an
    # absent chunk
    start: Tensor
    document: Tensor
    length: Tensor  # [batch, chunks] tokens, 0 for an absent chunk
    real: Tensor  # [batch, chunks] bool, neither absent nor padding
    fresh: Tensor  # [batch, chunks] bool, nothing of its document comes before it in the row
    fresh_somewhere: frozenset[int]  # chunks that are fresh in some row, known to the host

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, chunks)."""
        return self.start.shape[0], self.start.shape[1]

    @property
    def whole(self) -> Tensor:
        """[batch, chunks] bool: chunks of C tokens, the only ones that a later chunk can follow."""
        return self.length == self.chunk

    @torch.compiler.disable
    def cut(self, x: Tensor) -> Tensor:
        """[batch, seq, ...] -> [batch, chunks, C, ...]; zeros where there is no token."""
        return _cut(x, self.slots, *self.shape, self.chunk)

    @torch.compiler.disable
    def join(self, x: Tensor) -> Tensor:
        """The tokens of [batch, chunks, C, ...] as [batch, seq, ...]."""
        if self.slots is None:
            return x.flatten(1, 2)[:, : self.seq]
        return _Join.apply(x, self.slots)

    def spread(self, x: Tensor) -> Tensor:
        """[batch, chunks, ...] -> [batch, seq, ...], to every token what its chunk has."""
        return self.join(x.unsqueeze(2).expand(-1, -1, self.chunk, *x.shape[2:]))

    def mean(self, x: Tensor) -> Tensor:
        """[batch, seq, ...] -> [batch, chunks, ...], over the tokens that a chunk has; fp32 or
        wider."""
        total = self.cut(x).sum(2, dtype=widen(x[:0]).dtype)
        return total / self.length.clamp(min=1).view(*self.shape, *[1] * (x.dim() - 2))


@torch.compiler.disable
@per_layout
def chunk_grid(info: SequenceInfo, chunk: int) -> ChunkGrid:
    """Raises ValueError for a run of tokens that starts inside a chunk."""
    count, fresh, ordered = _plan(info, chunk)
    batch, seq = info.shape
    slots = None
    if not ordered:
        within = info.positions % chunk
        opens = info.starts | (within == 0)
        opens[:, 0] = True
        slots = (opens.cumsum(1) - 1) * chunk + within
        slots = slots + torch.arange(batch, device=slots.device).unsqueeze(1) * count * chunk
        slots = slots.flatten()

    def cut(x: Tensor) -> Tensor:
        return _cut(x, slots, batch, count, chunk)

    length = cut(torch.ones_like(info.index)).sum(2)
    start = cut(info.index)[:, :, 0].masked_fill(length == 0, ABSENT)
    document = cut(info.index - info.positions)[:, :, 0].masked_fill(length == 0, ABSENT)
    real = cut(info.valid)[:, :, 0]
    return ChunkGrid(
        chunk=chunk,
        seq=seq,
        slots=slots,
        start=start,
        document=document,
        length=length,
        real=real,
        fresh=cut(info.starts)[:, :, 0],
        fresh_somewhere=fresh,
    )


def _plan(info: SequenceInfo, chunk: int) -> tuple[int, frozenset[int], bool]:
    """Chunks of the longest row, those that start a document or follow a gap in some row, and
    whether the tokens of all rows lie on the grid as they are."""
    counts, fresh, ordered = [], set(), True
    for row in info.fragments:
        count = 0
        for run in runs(row):
            if run.position % chunk:
                raise ValueError(
                    f"tokens go on at position {run.position} of their document; routed layers "
                    f"allow multiples of their chunk of {chunk} tokens"
                )
            if run.start or run.position == 0:
                fresh.add(count)
            ordered &= run.start == count * chunk
            count += -(-(run.stop - run.start) // chunk)
        counts.append(count)
    return max(counts), frozenset(fresh), ordered


def _cut(x: Tensor, slots: Tensor | None, batch: int, count: int, chunk: int) -> Tensor:
    if slots is not None:
        return _Cut.apply(x, slots, count * chunk).unflatten(1, (count, chunk))
    missing = count * chunk - x.shape[1]
    x = F.pad(x, (*[0] * (2 * (x.dim() - 2)), 0, missing)) if missing else x
    return x.unflatten(1, (count, chunk))


class _Cut(torch.autograd.Function):
    """A copy to slots of which no two are equal, so the adjoint is a copy too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        batch, _, *rest = x.shape
        laid = x.new_zeros(batch * size, *rest).index_copy_(0, slots, x.flatten(0, 1))
        return laid.unflatten(0, (batch, size))

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (slots,) = ctx.saved_tensors
        batch = grad.shape[0]
        return grad.flatten(0, 1).index_select(0, slots).unflatten(0, (batch, -1)), None, None


class _Join(torch.autograd.Function):
    """[batch, chunks, C, ...] -> [batch, seq, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.shape = x.shape
        return x.flatten(0, 2).index_select(0, slots).unflatten(0, (x.shape[0], -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (slots,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape)
        total.view(-1, *ctx.shape[3:]).index_copy_(0, slots, grad.flatten(0, 1))
        return total, None
