"""One rank of a run that is to be killed: trains, and at a named point of a save kills ranks."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from parallel.mesh import Mesh
from trainer.build import build_mesh, build_trainer
from trainer.checkpoint.folder import CheckpointFolder
from trainer.run_folder import session

# Where a save is hit: behind the making of its folder, between the tensors of a shard, before the
# manifest, before the rename, before the pointer, and between the files of one that is removed.
POINTS = ("reserve", "shard", "seal", "publish", "point", "prune")
RANDOM = "random"  # from outside, at any time


@dataclass(frozen=True)
class Kill:
    """occurrence: how often rank `actor` gets to the point before it kills the victims; of RANDOM
    how many steps are recorded before."""

    point: str
    victims: tuple[int, ...]
    actor: int = 0
    occurrence: int = 1
    delay: float = 0.0  # RANDOM: seconds behind the last of these


def run(folder: Path, place: dict[str, str], config: dict[str, Any], kill: Kill | None) -> None:
    """Trains in config["run_dir"], then ends the process; `folder` is for this start alone.

    place: of this rank, as torchrun's environment has it.
    """
    code = 1
    rank = place["RANK"]
    try:
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        sys.stderr = (folder / f"errors{rank}").open("w", buffering=1)
        torch.set_num_threads(1)
        os.environ |= place
        _train(folder, build_mesh(config["parallel"]), config, kill)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _train(folder: Path, mesh: Mesh, config: dict[str, Any], kill: Kill | None) -> None:
    run_dir = Path(config["run_dir"])
    with session(run_dir, mesh):
        trainer = build_trainer(config, mesh=mesh, run_dir=run_dir)
        (folder / f"resumed{mesh.rank}").write_text(str(trainer.step))
        if kill is not None and kill.point != RANDOM and mesh.rank == kill.actor:
            _arm(kill, lambda: _strike(folder, run_dir, kill))
        trainer.run()
        dist.barrier()


def _strike(folder: Path, run_dir: Path, kill: Kill) -> None:
    seen = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    (folder / "landed").write_text(json.dumps(seen))
    for victim in sorted(kill.victims, key=lambda rank: rank == kill.actor):  # itself last
        os.kill(int((folder / f"pid{victim}").read_text()), signal.SIGKILL)


def _arm(kill: Kill, strike: Callable[[], None]) -> None:
    """Patches what the point stands for, so that `strike` is called there."""
    passed = 0

    def arrive(*args: Any) -> None:
        nonlocal passed
        passed += 1
        if passed == kill.occurrence:
            strike()

    if kill.point == "shard":
        _wrap(filesystem, "_write_item", before=arrive)
    elif kill.point == "reserve":
        _wrap(CheckpointFolder, "reserve", after=arrive)
    elif kill.point == "prune":
        _wrap(shutil, "rmtree", before=lambda path, *args: (_remove_some(path), arrive()))
    else:
        _wrap(CheckpointFolder, kill.point, before=arrive)


def _remove_some(folder: Path) -> None:
    for file in sorted(folder.iterdir())[:2]:
        file.unlink()


def _wrap(
    owner: Any,
    name: str,
    *,
    before: Callable[..., object] = lambda *args: None,
    after: Callable[..., object] = lambda *args: None,
) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        before(*args)
        result = original(*args, **options)
        after(*args)
        return result

    setattr(owner, name, wrapped)
