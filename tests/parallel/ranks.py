"""Runs a check on several gloo ranks, each a process, and judges it by what the ranks left behind.

A rank that finished its work may rarely abort while its process exits; that neither fails a check
nor hides one that failed.
"""

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.collectives import Axis, Traffic
from tests.launch import FORKSERVER


def on_ranks(ranks: int, check: Callable[..., None], *args: object, seconds: float = 120) -> None:
    """`check(axis, *args)` on every rank; a module-level function. Put many cases into one call:
    the processes take a second or two to start. Raises AssertionError with a rank's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKSERVER.Process(target=_run, args=(Path(folder), rank, ranks, check, args))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
            process.kill()
        left = {rank: Path(folder, f"{rank}.txt") for rank in range(ranks)}
        told = {
            rank: path.read_text() if path.exists() else "no end" for rank, path in left.items()
        }
    failed = [f"rank {rank}: {text}" for rank, text in told.items() if text != "passed"]
    # A rank that fails leaves the others waiting: the shortest report is theirs.
    assert not failed, "\n".join(sorted(failed, key=len, reverse=True))


def _run(folder: Path, rank: int, ranks: int, check: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    assert dist.group.WORLD is not None
    axis = Axis(dist.group.WORLD, rank, ranks, Traffic())
    try:
        check(axis, *args)
        dist.barrier()
        told = "passed"
    except BaseException:
        told = traceback.format_exc()
    Path(folder, f".{rank}").write_text(told)
    Path(folder, f".{rank}").rename(folder / f"{rank}.txt")
