"""What the schemes of softmax attention share: what they take, and when nothing has to move."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.ops.softmax import merge_
from models.precision import autocast, widen
from models.sequence import SequenceInfo, SoftmaxAttention
from parallel.collectives import Axis
from parallel.plans import (
    Row,
    add_,
    cut_documents,
    cut_part,
    own_rank,
    put_,
    refuse_keys,
    row_info,
    take,
    where,
)

Options = dict[str, Any]


class SoftmaxScheme(SoftmaxAttention):
    """Attention of a local row to keys on all ranks of an axis, computed by `op` in blocks.

    A window hides keys and saves no message. Raises ValueError for what only a whole sequence on
    one rank can have: other keys than the row's own (decoding), and further masks.
    """

    def __init__(self, op: SoftmaxAttention, *, axis: Axis) -> None:
        super().__init__(causal=op.causal)
        self.op, self.axis = op, axis

    # The plans change with every batch: nothing for a compiler to keep.
    @torch.compiler.disable
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        info: SequenceInfo,
        *,
        key_info: SequenceInfo | None = None,
        scale: float | None = None,
        window: int | None = None,
        **masks,
    ) -> Tensor:
        refuse_keys(self, info, key_info)
        for mask, given in masks.items():
            if given is not None:
                name = type(self).__name__
                raise ValueError(f"{name} takes no {mask}; parallel=single does")
        own_rank(info)
        if not cut_documents(info.peers):
            return self.op(q, k, v, info, scale=scale, window=window)
        q, k, v = autocast(q, k, v)
        options: Options = {"scale": scale or q.shape[-1] ** -0.5, "window": window}
        return self.attend(q, k, v, info, options)

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, options: Options
    ) -> Tensor:
        """`forward` where some document lies on several ranks; options: the op's keywords."""

    def block(self, q, k, v, info, key_info, **kwargs):
        raise ValueError(f"{type(self).__name__} has no blocks: it is made of those of its op")

    def block_backward(self, grad_output, q, k, v, output, lse, info, key_info, **kwargs):
        raise ValueError(f"{type(self).__name__} has no blocks: it is made of those of its op")


def pack(k: Tensor, v: Tensor) -> Tensor:
    """[rows, heads, dim] and [rows, heads, v_dim] as the one tensor that travels."""
    return torch.cat([k, v], dim=-1)


def unpack(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What was packed, with a batch dim of 1 and the last dims of k and v."""
    keys, values = packed.unsqueeze(0).split([k.shape[-1], v.shape[-1]], dim=-1)
    return keys, values


class Merging:
    """Attention of this row, over its own keys at first, to which keys of other ranks are added.

    Only the queries in cut documents can see those, so only they are merged, in fp32 or wider.
    """

    def __init__(
        self,
        op: SoftmaxAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        info: SequenceInfo,
        options: Options,
    ) -> None:
        self.op, self.options, self.readers = op, options, Readers.of(info)
        self.peers = info.peers
        self.whole = op.block(q, k, v, info, info, **options)
        self.q = self.readers.take(q)
        self.output, self.lse = (widen(self.readers.take(x)) for x in self.whole)

    def add(self, k: Tensor, v: Tensor, keys: Row) -> None:
        key_info = row_info(self.peers, keys, k.device)
        part = self.op.block(self.q, k, v, self.readers.info, key_info, **self.options)
        merge_(self.output, self.lse, *part)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Output and lse of the whole row over all keys."""
        for x, merged in zip(self.whole, (self.output, self.lse), strict=True):
            put_(x[0], self.readers.rows, merged[0])
        return self.whole


class Readers(NamedTuple):
    """The queries of a row that may see keys of other ranks."""

    rows: tuple[slice, ...]
    info: SequenceInfo  # of the whole row where there are none

    @classmethod
    def of(cls, info: SequenceInfo) -> "Readers":
        row, part = info.fragments[0], cut_part(info.peers, own_rank(info))
        part_info = row_info(info.peers, part or row, info.index.device)
        return cls(where(row, part), part_info)

    def take(self, x: Tensor) -> Tensor:
        """Their rows of [1, seq, ...]."""
        return take(x[0], self.rows).unsqueeze(0)


class Gradients:
    """dq, dk and dv of this row, to which those due to keys of other ranks are added; fp32 or
    wider.

    saved: gradient of the output, q, and over all keys output and lse.
    """

    def __init__(
        self,
        op: SoftmaxAttention,
        saved: tuple[Tensor, ...],
        info: SequenceInfo,
        options: Options,
    ) -> None:
        self.op, self.saved, self.info, self.options = op, saved, info, options
        self.readers = Readers.of(info)
        self.cut = tuple(map(self.readers.take, saved))
        self.grad_q = torch.zeros_like(widen(self.cut[1]))  # of the queries in cut documents

    def of(self, k: Tensor, v: Tensor, keys: Row) -> Tensor:
        """dk and dv of these keys of another rank, packed."""
        key_info = row_info(self.info.peers, keys, k.device)
        grad_q, packed = self._block(self.cut, k, v, self.readers.info, key_info)
        self.grad_q += grad_q
        return packed

    def own(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """dq, complete, and dk and dv of the own keys due to the own queries, packed."""
        grad_q, packed = self._block(self.saved, k, v, self.info, self.info)
        add_(grad_q[0], self.readers.rows, self.grad_q[0])
        return grad_q, packed

    def _block(self, saved, k, v, info, key_info) -> tuple[Tensor, Tensor]:
        grad_output, q, output, lse = saved
        grads = self.op.block_backward(
            grad_output, q, k, v, output, lse, info, key_info, **self.options
        )
        grad_q, grad_k, grad_v = map(widen, grads)
        return grad_q, pack(grad_k[0], grad_v[0])
