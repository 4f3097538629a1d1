"""The processes of a run: which one this is, which device it drives, and its process group."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.collectives import barrier


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """`group` is None for a single process: nothing is communicated then."""

    device: torch.device
    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes the files and the lines of the run."""
        return self.rank == 0

    def describe(self) -> str:
        backend = f", {dist.get_backend(self.group)}" if self.group else ""
        return f"{self.ranks} x {self.device.type}{backend}"


def join(timeout_minutes: float = 30) -> Mesh:
    """The mesh that torchrun's environment describes; a single process without it."""
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Mesh(device=device)
    # Counts of tokens are summed on the host, so that no device is waited for.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return Mesh(device=device, rank=rank, ranks=ranks, group=dist.group.WORLD)


def leave(mesh: Mesh) -> None:
    """Waits for every rank, then gives the group up."""
    if mesh.group is not None:
        barrier(mesh.group)
        dist.destroy_process_group()
