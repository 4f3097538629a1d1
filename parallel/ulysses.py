"""Heads instead of tokens: DeepSpeed Ulysses, arXiv 2309.14509, for any layout and any heads.

An all-to-all gives each rank all tokens of its group for a share of the heads. Tokens arrive
sorted by global index, so that a kernel sees what it would see on one rank; the sorting is part of
the copies into and out of the messages. With a ring or gather scheme inside, over the groups, it
is the two-level scheme of USP, arXiv 2405.07719.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor

from models.precision import widen
from models.sequence import SequenceInfo, SequenceOp
from parallel.collectives import Axis
from parallel.plans import merge_order, merged_info, own_rank
from parallel.softmax import Options, SoftmaxScheme


class HeadExchange:
    """Trades tokens for heads among the ranks of an axis, and back; differentiable.

    The context ranks form groups of `axis.ranks` neighbours. `info` is the `SequenceInfo` of the
    group's merged row, sorted by global index, and its peers are the merged rows of all groups.
    `own` are this rank's of the `heads` heads. A tensor with fewer heads, as keys under grouped
    queries, goes to each rank with the heads that its own read, `range(own.start // group,
    ceil(own.stop / group))`; gradients of a head that went to several ranks are summed.
    Raises ValueError where there are more ranks than heads.
    """

    def __init__(self, axis: Axis, info: SequenceInfo, *, heads: int, op: str) -> None:
        if heads < axis.ranks:
            raise ValueError(f"ulysses is {axis.ranks} with {heads} heads of {op}; at most {heads}")
        if len(info.peers) % axis.ranks:
            raise ValueError(
                f"ulysses is {axis.ranks}; it must divide the {len(info.peers)} context ranks"
            )
        self.axis, self.heads, self.op = axis, heads, op
        group = axis.ranks, own_rank(info), info.index.device
        self.info = merged_info(info.peers, *group)
        self._sort, self._unsort = merge_order(info.peers, *group)
        self.own = self._share(axis.rank, heads)

    def check_inner(self, op: SequenceOp, scheme: type[SequenceOp]) -> None:
        """Raises ValueError where there are several groups and `op`, which gets the merged row of
        one, is no scheme over them: it would see a part of a document as the whole."""
        groups, ranks = len(self.info.peers), self.axis.ranks
        if groups > 1 and not isinstance(op, scheme):
            raise ValueError(
                f"{type(op).__name__} inside ulysses={ranks} of {groups * ranks} context ranks; "
                f"it must be a {scheme.__name__} over the other ranks"
            )

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[1, seq, heads or fewer, dim] each -> [1, merged seq, own heads, dim]; one message for
        all the tensors of a dtype."""
        moved = {}
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            moved[dtype] = iter(_ToHeads.apply(self, *(x for x in tensors if x.dtype == dtype)))
        return tuple(next(moved[x.dtype]) for x in tensors)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[1, merged seq, own heads, dim] -> [1, seq, heads, dim]."""
        return _ToTokens.apply(self, x)

    def _share(self, rank: int, heads: int) -> range:
        """Which of so many heads go to a rank; its own are as many as others have, or one more."""
        each, more = divmod(self.heads, self.axis.ranks)
        first = rank * each + min(rank, more)
        last, group = first + each + (rank < more), self.heads // heads
        return range(first // group, -(-last // group))

    def _shares(self, tensors: tuple[Tensor, ...], heads: list[int]) -> list[list[tuple]]:
        """Per rank and tensor: columns in the rows of its message, and the heads that they are."""
        shares = []
        for rank in range(self.axis.ranks):
            stop, columns = 0, []
            for x, total in zip(tensors, heads, strict=True):
                share = self._share(rank, total)
                start, stop = stop, stop + len(share) * x.shape[-1]
                columns.append((slice(start, stop), slice(share.start, share.stop)))
            shares.append(columns)
        return shares

    def scatter_heads(self, tensors: tuple[Tensor, ...], direction: str) -> tuple[Tensor, ...]:
        """What `to_heads` does, without gradients."""
        seq = tensors[0].shape[1]
        shares = self._shares(tensors, [x.shape[2] for x in tensors])
        widths = [columns[-1][0].stop for columns in shares]
        sent = tensors[0].new_empty(seq * sum(widths))
        messages = sent.split([seq * width for width in widths])
        for message, columns in zip(messages, shares, strict=True):
            for x, (where, heads) in zip(tensors, columns, strict=True):
                part = message.view(seq, -1)[:, where].unflatten(1, (-1, x.shape[-1]))
                part.copy_(x[0, :, heads])
        own = widths[self.axis.rank]
        received = self._exchange(sent, widths, [own] * len(widths), seq, direction)
        rows = received.view(-1, own)
        return tuple(
            rows[:, where].index_select(0, self._sort).unflatten(1, (-1, x.shape[-1])).unsqueeze(0)
            for x, (where, _) in zip(tensors, shares[self.axis.rank], strict=True)
        )

    def gather_heads(
        self, tensors: tuple[Tensor, ...], heads: list[int], direction: str
    ) -> tuple[Tensor, ...]:
        """The adjoint of `scatter_heads`, for tensors that had so many heads before it."""
        shares = self._shares(tensors, heads)
        widths = [columns[-1][0].stop for columns in shares]
        own, seq = widths[self.axis.rank], tensors[0].shape[1] // self.axis.ranks
        rows = [x[0].flatten(1).index_select(0, self._unsort) for x in tensors]
        sent = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        received = self._exchange(sent.flatten(), [own] * len(widths), widths, seq, direction)
        messages = received.split([seq * width for width in widths])
        whole = []
        for i, (x, total) in enumerate(zip(tensors, heads, strict=True)):
            replicated = sum(len(self._share(rank, total)) for rank in range(len(shares))) > total
            empty = widen(x[:0]).new_zeros if replicated else x.new_empty
            out = empty(seq, total, x.shape[-1])
            write = Tensor.add_ if replicated else Tensor.copy_
            for message, columns in zip(messages, shares, strict=True):
                where, to = columns[i]
                part = message.view(seq, -1)[:, where].unflatten(1, (-1, x.shape[-1]))
                write(out[:, to], part)
            whole.append(out.to(x.dtype).unsqueeze(0))
        return tuple(whole)

    def _exchange(
        self, x: Tensor, sent: list[int], received: list[int], seq: int, direction: str
    ) -> Tensor:
        counts = [seq * width for width in sent], [seq * width for width in received]
        return self.axis.exchange(x, *counts, op=self.op, direction=direction).wait()


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tensors: Tensor):
        ctx.exchange, ctx.heads = exchange, [x.shape[2] for x in tensors]
        return exchange.scatter_heads(tensors, "forward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return None, *ctx.exchange.gather_heads(grads, ctx.heads, "backward")


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, x: Tensor):
        ctx.exchange = exchange
        return exchange.gather_heads((x,), [exchange.heads], "forward")[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return None, *ctx.exchange.scatter_heads((grad,), "backward")


class UlyssesAttention(SoftmaxScheme):
    """`op` on all tokens of the axis for a share of the heads.

    op: a local kernel, or a ring or gather scheme over the ranks that hold the same heads.
    Where no key head is replicated, results and gradients are bitwise those of one rank.
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, options: Options
    ) -> Tensor:
        exchange = HeadExchange(self.axis, info, heads=q.shape[2], op="softmax")
        exchange.check_inner(self.op, SoftmaxScheme)
        group = q.shape[2] // k.shape[2]
        q, k, v = exchange.to_heads(q, k, v)
        counts = repeats(exchange.own, group)
        k, v = (repeat_heads(x, counts) for x in (k, v))
        output = self.op(q, k, v, exchange.info, **options)
        return exchange.to_tokens(output)


def repeats(own: range, group: int) -> list[int]:
    """How often to repeat each local key head so that all serve equally many of the own heads."""
    served = [
        len(own[max(0, h - own.start) : h + group - own.start])
        for h in range(own.start // group * group, own.stop, group)
    ]
    return [count // gcd(*served) for count in served]


def repeat_heads(x: Tensor, counts: list[int]) -> Tensor:
    """Head i of [1, seq, heads, dim] counts[i] times."""
    if max(counts) == 1:
        return x
    heads = zip(x.split(1, dim=2), counts, strict=True)
    return torch.cat([head.expand(-1, -1, count, -1) for head, count in heads], dim=2)
