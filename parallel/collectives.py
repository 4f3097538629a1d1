"""Every collective of the system, none of them a call where there is no group."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Names since torch 2.13, which warns of the ones before.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class LostRankError(Exception):
    """A message of another rank cannot come any more: one line with the backend's reason."""


@contextlib.contextmanager
def reaching_ranks() -> Iterator[None]:
    """Around what waits for other ranks; raises LostRankError where one is gone or too late.

    Of NCCL only what is awaited on the host ends here: its watchdog ends the process otherwise.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostRankError(f"another rank ended, or did not answer in time: {reason}") from error


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the group, in place and returned; without gradients."""
    if group is not None:
        with reaching_ranks():
            dist.all_reduce(x, group=group)
    return x


def max_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest of the group, in place and returned; without gradients."""
    if group is not None:
        with reaching_ranks():
            dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def spread(x: Tensor, source: int, group: dist.ProcessGroup | None) -> Tensor:
    """What x is on rank `source`, in place and returned; without gradients."""
    if group is not None:
        with reaching_ranks():
            dist.broadcast(x, group_src=source, group=group)
    return x


def start_sum(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Like `sum_over_ranks`, but returns at once; x holds the sum after the work's `wait()`."""
    return dist.all_reduce(x, group=group, async_op=True)


def gather_rows(
    out: Tensor, x: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """[n, ...] of every rank into `out` [ranks x n, ...], in the order of the ranks."""
    with reaching_ranks():
        return _all_gather(out, x, group, async_op)


def sum_scatter_rows(
    out: Tensor, x: Tensor, group: dist.ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """This rank's part of the sum over ranks of x [ranks x n, ...] into `out` [n, ...]."""
    with reaching_ranks():
        return _reduce_scatter(out, x, group=group, async_op=async_op)


def gather_objects(item: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's item, in order of rank, on all of them; for small and rare things."""
    if group is None:
        return [item]
    items: list[T] = [item] * dist.get_world_size(group)
    with reaching_ranks():
        dist.all_gather_object(items, item, group=group)
    return items


def barrier(group: dist.ProcessGroup | None) -> None:
    """Waits for every rank; on the host, where NCCL's own barrier would guess a device."""
    sum_over_ranks(torch.zeros(1), group)


class Traffic:
    """Bytes that this rank received from others, by (kind, op, direction).

    kind: the collective; op: what it served (softmax, routed, latent, recurrence, conv); direction:
    forward or backward. `trace`, where it is a list, takes a line per message posted or awaited.
    """

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        self.trace: list[tuple[str, str]] | None = None

    def take(self) -> Counter[tuple[str, str, str]]:
        """What was counted since this was last called."""
        taken, self.bytes = self.bytes, Counter()
        return taken

    def note(self, event: str, subject: str) -> None:
        if self.trace is not None:
            self.trace.append((event, subject))


class Pending:
    """A message under way; `wait` gives the tensor that it fills."""

    def __init__(self, tensor: Tensor, works: list[dist.Work], traffic: Traffic, subject: str):
        self._tensor, self._works, self._traffic, self._subject = tensor, works, traffic, subject

    def wait(self) -> Tensor:
        with reaching_ranks():
            for work in self._works:
                work.wait()
        self._works = []
        self._traffic.note("wait", self._subject)
        return self._tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """The ranks that share a sequence, or a part of it, in their order on it.

    All messages are started at once and awaited through what they return. The adjoint of each is
    the same call with its counts swapped (`exchange`), its step negated (`shift`) or the other
    call (`gather` and `sum_scatter`). Every rank of the axis makes the same calls in the same
    order, forward and backward.
    """

    group: dist.ProcessGroup
    rank: int
    ranks: int
    traffic: Traffic

    def exchange(
        self, x: Tensor, sent: Sequence[int], received: Sequence[int], *, op: str, direction: str
    ) -> Pending:
        """x [sum(sent), ...]: rows for rank 0, then for rank 1, ...; -> [sum(received), ...] alike.

        received[r] must be what rank r's sent has for this rank.
        """
        out = x.new_empty(sum(received), *x.shape[1:])
        work = dist.all_to_all_single(
            out, x.contiguous(), list(received), list(sent), self.group, async_op=True
        )
        others = sum(received) - received[self.rank]
        return self._pending(out, [work], others * _row_bytes(x), "all_to_all", op, direction)

    def shift(self, x: Tensor, rows: int, *, op: str, direction: str, step: int = 1) -> Pending:
        """Sends x to the rank `step` behind this one on the ring; -> [rows, ...] from that before.

        Nothing is posted for an empty side, so both ends must know the sizes.
        """
        out = x.new_empty(rows, *x.shape[1:])
        to, source = (self.rank + step) % self.ranks, (self.rank - step) % self.ranks
        messages = []
        if len(x):
            to = dist.get_global_rank(self.group, to)
            messages.append(dist.P2POp(dist.isend, x.contiguous(), to, self.group))
        if rows:
            source = dist.get_global_rank(self.group, source)
            messages.append(dist.P2POp(dist.irecv, out, source, self.group))
        with reaching_ranks():  # a pair that broke is noticed here
            works = dist.batch_isend_irecv(messages) if messages else []
        return self._pending(out, works, rows * _row_bytes(x), "shift", op, direction)

    def gather(self, x: Tensor, *, op: str, direction: str) -> Pending:
        """[n, ...] on every rank -> [ranks x n, ...], in the order of the ranks."""
        out = x.new_empty(self.ranks * len(x), *x.shape[1:])
        work = _all_gather(out, x.contiguous(), self.group, async_op=True)
        received = (self.ranks - 1) * len(x) * _row_bytes(x)
        return self._pending(out, [work], received, "all_gather", op, direction)

    def sum_scatter(self, x: Tensor, *, op: str, direction: str) -> Pending:
        """[ranks x n, ...] -> [n, ...]: the sum over ranks of this rank's part."""
        out = x.new_empty(len(x) // self.ranks, *x.shape[1:])
        work = _reduce_scatter(out, x.contiguous(), group=self.group, async_op=True)
        received = (self.ranks - 1) * len(out) * _row_bytes(x)
        return self._pending(out, [work], received, "reduce_scatter", op, direction)

    def _pending(
        self, out: Tensor, works: list, received: int, kind: str, op: str, direction: str
    ) -> Pending:
        self.traffic.bytes[kind, op, direction] += received
        self.traffic.note("post", f"{op} {kind} {direction}")
        return Pending(out, works, self.traffic, f"{op} {kind} {direction}")


def _row_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()
