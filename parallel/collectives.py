"""Every collective of the system, none of them a call where there is no group."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the group, in place and returned; without gradients."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def start_sum(x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Like `sum_over_ranks`, but returns at once; x holds the sum after the work's `wait()`."""
    return dist.all_reduce(x, group=group, async_op=True)


def gather_objects(item: T, group: dist.ProcessGroup | None) -> list[T]:
    """Every rank's item, in order of rank, on all of them; for small and rare things."""
    if group is None:
        return [item]
    items: list[T] = [item] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def barrier(group: dist.ProcessGroup | None) -> None:
    """Waits for every rank; on the host, where NCCL's own barrier would guess a device."""
    sum_over_ranks(torch.zeros(1), group)
