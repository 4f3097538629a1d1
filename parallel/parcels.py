"""Parcels of routed chunks: which of a rank's chunks another needs, and how they travel.

A rank lends another the whole chunks that later queries there may see: a matter of the layout, so
known to both. Which of them a head keeps is known once a mask has been sent, and then only those
travel, by head: sizes are read on the host, once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.routed import ABSENT
from models.ops.runs import runs
from models.sequence import Peers, per_layout
from parallel.collectives import Axis, Pending
from parallel.plans import cut_documents

OP = "routed"  # in the traffic


class Loans(NamedTuple):
    """Chunks that a rank lends and borrows, by the other rank."""

    columns: Tensor  # [lent], in the grid of the own row
    lent: tuple[int, ...]  # to each rank
    starts: Tensor  # [borrowed], index of the first token in the packed global sequence
    borrowed: tuple[int, ...]  # from each rank


@per_layout
def loans(peers: Peers, rank: int, chunk: int, device: torch.device) -> Loans:
    """Its tensors are moved once."""
    others = [r if r != rank else None for r in range(len(peers))]
    lent = [needed(peers, rank, r, chunk) for r in others]
    borrowed = [needed(peers, r, rank, chunk) for r in others]

    def joined(lists: list[list[tuple[int, int]]], part: int) -> Tensor:
        return torch.tensor([c[part] for found in lists for c in found]).long().to(device)

    return Loans(
        joined(lent, 0), tuple(map(len, lent)), joined(borrowed, 1), tuple(map(len, borrowed))
    )


def needed(
    peers: Peers, owner: int | None, reader: int | None, chunk: int
) -> list[tuple[int, int]]:
    """(column in the owner's grid, index) of its whole chunks before some query of the reader."""
    if owner is None or reader is None:
        return []
    last = {run.document: run.index for run in sorted(runs(peers[reader]), key=lambda r: r.index)}
    found, column = [], 0
    for run in runs(peers[owner]):
        length = run.stop - run.start
        if run.document in cut_documents(peers) and run.index < last.get(run.document, -1):
            found += [(column + i, run.index + i * chunk) for i in range(length // chunk)]
        column += -(-length // chunk)
    return found


@dataclass(frozen=True)
class Choice:
    """Of the chunks lent and borrowed those that travel, by head, and how many by rank and head."""

    loans: Loans
    lent: Tensor  # [lent, heads] bool
    borrowed: Tensor
    sent: list[list[int]]
    received: list[list[int]]

    @classmethod
    def of(cls, plan: Loans, lent: Tensor, borrowed: Tensor) -> "Choice":
        """Waits for the device."""
        parts = *lent.split(plan.lent), *borrowed.split(plan.borrowed)
        counts = torch.stack([part.sum(0) for part in parts]).tolist()
        ranks = len(plan.lent)
        return cls(plan, lent, borrowed, counts[:ranks], counts[ranks:])

    def others(self) -> "Choice":
        """The chunks that are not of this choice."""
        pairs = (self.loans.lent, self.sent), (self.loans.borrowed, self.received)
        sent, received = (
            [
                [all_of - count for count in heads]
                for all_of, heads in zip(totals, counts, strict=True)
            ]
            for totals, counts in pairs
        )
        return Choice(self.loans, ~self.lent, ~self.borrowed, sent, received)

    def parcels(self, axis: Axis, columns: int, to: range, source: range) -> "Parcels":
        """To and from these ranks; columns: of the grid of the own row."""
        plan, heads = self.loans, self.lent.shape[1]
        sent = tuple(sum(x) if rank in to else 0 for rank, x in enumerate(self.sent))
        received = tuple(sum(x) if rank in source else 0 for rank, x in enumerate(self.received))
        going, coming = _rows(plan.lent, to), _rows(plan.borrowed, source)
        row, head = _chosen(self.lent[going], sum(sent))
        places = head * columns + plan.columns[going][row]
        slots = max(map(sum, zip(*self.received[source.start : source.stop], strict=True)))
        mask = self.borrowed[coming]
        row, head = _chosen(mask, sum(received))
        slot = head * slots + (mask.cumsum(0) - 1)[row, head]
        index = mask.new_full((heads * slots,), ABSENT, dtype=torch.int64)
        index[slot] = plan.starts[coming][row]
        return Parcels(axis, sent, received, places, slot, index.view(heads, slots))


def _rows(counts: Sequence[int], ranks: range) -> slice:
    return slice(sum(counts[: ranks.start]), sum(counts[: ranks.stop]))


def _chosen(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row and column of the `count` entries that are True, in order; does not wait for them."""
    places = mask.flatten().byte().argsort(descending=True, stable=True)[:count]
    return places // mask.shape[1], places % mask.shape[1]


@dataclass(frozen=True)
class Parcels:
    """Chunks of single heads on their way: from [heads, columns, ...] of their owners, other ones
    for each reader, to [heads, slots, ...] of their readers."""

    axis: Axis
    sent: tuple[int, ...]  # to each rank
    received: tuple[int, ...]
    places: Tensor  # [sent], in the own heads x columns
    slots: Tensor  # [received], in heads x slots
    index: Tensor  # [heads, slots], of the first token; ABSENT in an empty slot

    def fetch(self, *tensors: Tensor, direction: str) -> Pending:
        """Lends these; what comes is for `unpack`."""
        message = _pack(tensors, self.places)
        return self.axis.exchange(message, self.sent, self.received, op=OP, direction=direction)

    def unpack(self, message: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
        """[heads, slots, ...] for each of what was lent, of which these are the own; zeros in empty
        slots."""
        for part, x in zip(_split(message, tensors), tensors, strict=True):
            laid = part.new_zeros(self.index.numel(), *part.shape[1:])
            yield laid.index_copy_(0, self.slots, part).view(*self.index.shape, *x.shape[2:])

    def give_back(self, *grads: Tensor) -> Pending:
        """Gradients of what was borrowed, for `add_returned`."""
        message = _pack(grads, self.slots)
        return self.axis.exchange(message, self.received, self.sent, op=OP, direction="backward")

    def add_returned(self, message: Tensor, *totals: Tensor) -> None:
        """Adds them to those of the own tensors: rank by rank, each of which names a place once."""
        for returned, places in zip(
            message.split(self.sent), self.places.split(self.sent), strict=True
        ):
            for part, total in zip(_split(returned, totals), totals, strict=True):
                flat = total.view(-1, *part.shape[1:])
                flat[places] += part


def _pack(tensors: Sequence[Tensor], places: Tensor) -> Tensor:
    """[places, numbers of all tensors], of [heads, columns, ...]."""
    flat = (x.reshape(-1, prod(x.shape[2:]))[places] for x in tensors)
    return torch.cat(list(flat), dim=1)


def _split(message: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return message.split([prod(x.shape[2:]) for x in tensors], dim=1)
