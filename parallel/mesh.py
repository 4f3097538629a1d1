"""The processes of a run: which one this is, which device it drives, and its process groups.

Ranks that share sequences, a context group, are consecutive; those that share a Ulysses group are
consecutive within it, so that the widest messages stay inside a node:

    rank = (data_rank * ring ranks + ring rank) * ulysses ranks + ulysses rank
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives import (
    Axis,
    LostRankError,
    Traffic,
    barrier,
    gather_objects,
    sum_over_ranks,
)
from parallel.watchdog import Watchdog

FAILURE_SECONDS = 10.0  # from the first rank that fails to the last, if all do

_joins = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """`group` is every process of the run, None for a single one: nothing is communicated then.

    Ranks with equal data_rank read the same rows and share their tokens over `context`, which is
    `ulysses` x `ring`; all three are None where every rank holds whole rows. They count bytes
    together. `store` is what they met in; `timeout`, the longest that a message may take.
    """

    device: torch.device
    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    context: Axis | None = None
    ulysses: Axis | None = None
    ring: Axis | None = None
    store: dist.Store | None = None
    timeout: timedelta = timedelta(minutes=30)

    @property
    def main(self) -> bool:
        """Whether this process writes the files and the lines of the run."""
        return self.rank == 0

    @property
    def context_ranks(self) -> int:
        return 1 if self.context is None else self.context.ranks

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_ranks

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.context_ranks

    def describe(self) -> str:
        backend = f", {dist.get_backend(self.group)}" if self.group else ""
        if self.ulysses is None or self.ring is None:
            return f"{self.ranks} x {self.device.type}{backend}"
        shape = f"{self.data_ranks} data x {self.ring.ranks} ring x {self.ulysses.ranks} ulysses"
        return f"{self.ranks} x {self.device.type} = {shape}{backend}"


def join(*, timeout_minutes: float = 30, cp: int | None = 1, ulysses: int = 1) -> Mesh:
    """The mesh that torchrun's environment describes; a single process without it.

    cp: ranks that share a sequence, None for all; ulysses: how many of them are neighbours in a
    Ulysses group. A rank that waits longer than timeout_minutes for a message gives up.
    Raises ValueError, on every rank, unless ulysses divides cp and cp the number of ranks, and
    both are the same everywhere.
    """
    ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    cp = context_ranks(ranks=ranks, cp=cp, ulysses=ulysses)
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Mesh(device=device)
    # Counts of tokens are summed on the host, so that no device is waited for.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    # The heartbeat must not push out what a rank that hangs did last.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "20000")
    # In a sweep a process joins once per job; a name of its own keeps each from the keys that the
    # job before it left in the store.
    store = dist.PrefixStore(f"join {next(_joins)}", _meet(timeout))
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    shapes = gather_objects((cp, ulysses), dist.group.WORLD)
    if len(set(shapes)) > 1:  # ranks that make other groups would wait for each other in vain
        dist.destroy_process_group()
        raise ValueError(f"cp and ulysses are, by rank, {shapes}; allowed: the same on every rank")
    axes: dict[str, Axis] = {}
    if cp > 1:
        axes = _axes(torch.arange(ranks).view(-1, cp // ulysses, ulysses), device, timeout)
    group = dist.group.WORLD
    return Mesh(
        device=device, rank=rank, ranks=ranks, group=group, store=store, timeout=timeout, **axes
    )


@functools.cache
def _meet(timeout: timedelta) -> dist.Store:
    """What all ranks write to, kept for the life of the process: without torchrun rank 0 serves it,
    and would close it behind one job while the others have come back for the next."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store


def host_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """Another group of all ranks, for what a thread of its own has to say on the host; None for a
    single process. Collective."""
    return None if mesh.group is None else dist.new_group(backend="gloo", timeout=mesh.timeout)


def context_ranks(*, ranks: int, cp: int | None, ulysses: int) -> int:
    """The ranks that share a sequence; raises ValueError as `join` does."""
    cp = ranks if cp is None else cp
    if cp < 1 or ranks % cp:
        raise ValueError(f"cp is {cp}; allowed: a divisor of the run's {ranks} ranks")
    if ulysses < 1 or cp % ulysses:
        raise ValueError(f"ulysses is {ulysses}; allowed: a divisor of cp={cp}")
    return cp


def leave(mesh: Mesh) -> None:
    """Waits for every rank, then gives the groups up."""
    barrier(mesh.group)
    _give_up(mesh)


@contextlib.contextmanager
def membership(
    mesh: Mesh,
    *,
    lost_seconds: float = 60.0,
    hang_seconds: float | None = None,
    folder: Path | None = None,
) -> Iterator[Watchdog]:
    """Leaves at the end, also of what failed on every rank: the next job of a sweep can join then.

    A rank that fails alone stays `joined`, for the others wait for it; its process has to end. The
    watchdog ends the others. It takes the bounds, and folder.
    """
    hosts = gather_objects(os.uname().nodename, mesh.group)
    bounds: dict[str, Any] = {"lost_seconds": lost_seconds, "hang_seconds": hang_seconds}
    watchdog = Watchdog(rank=mesh.rank, hosts=hosts, store=mesh.store, folder=folder, **bounds)
    try:
        yield watchdog
    except LostRankError as error:
        raise LostRankError(watchdog.reason(str(error))) from error
    except Exception as error:
        watchdog.tell(f"{type(error).__name__}: {error}".partition("\n")[0])
        if mesh.store is None or _all_failed(mesh, mesh.store):
            watchdog.leave()
            _give_up(mesh)
            watchdog.close()
        raise
    watchdog.leave()
    leave(mesh)
    watchdog.close()


def _give_up(mesh: Mesh) -> None:
    if mesh.group is not None:
        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process is in a group, as the ones that it talks to believe."""
    return dist.is_initialized()


def _all_failed(mesh: Mesh, store: dist.Store) -> bool:
    """Through the store: in their groups the others may wait for another message."""
    names = [f"failed {rank}" for rank in range(mesh.ranks)]
    try:
        store.set(names[mesh.rank], "")
        store.wait(names, timedelta(seconds=FAILURE_SECONDS))
    except RuntimeError:  # too late, or the process that keeps the store is gone
        return False
    return True


def node_axis(mesh: Mesh) -> Axis | None:
    """The ranks that one torchrun started; None if there is one only, or one rank in each."""
    node = int(os.environ.get("GROUP_RANK", 0))
    nodes = gather_objects(node, mesh.group)
    members = [[rank for rank, own in enumerate(nodes) if own == n] for n in sorted(set(nodes))]
    if len(members) == 1 or max(map(len, members)) == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=mesh.timeout)
    assert group is not None
    return Axis(group, dist.get_rank(group), dist.get_world_size(group), Traffic())


def subgroup(groups: torch.Tensor, device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    """groups: [groups, ranks], every rank of the run once; -> the one of this rank. Collective.

    torch's DeviceMesh would make the same groups, but gives them no time-out of ours.
    """
    group, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=timeout)
    assert group is not None
    # NCCL connects a group in its first call, for which it needs all ranks; a hop of a ring may be
    # the first, and concerns two of them only.
    sum_over_ranks(torch.zeros(1, device=device), group)
    return group


def _axes(ranks: torch.Tensor, device: torch.device, timeout: timedelta) -> dict[str, Axis]:
    """ranks: [data, ring, ulysses]."""
    traffic = Traffic()
    members = {
        "context": ranks.flatten(1),
        "ulysses": ranks.flatten(0, 1),
        "ring": ranks.mT.flatten(0, 1),
    }
    axes = {}
    for name, groups in members.items():
        group = subgroup(groups, device, timeout)
        axes[name] = Axis(group, dist.get_rank(group), groups.shape[1], traffic)
    return axes
