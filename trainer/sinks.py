"""Where the records of a run go, by the configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parallel.mesh import Mesh
from trainer.checkpoint.ranks import Ranks
from trainer.console import Console
from trainer.construct import call
from trainer.errors import ConfigError
from trainer.loop import Sink, Trainer
from trainer.metrics import MetricsFile
from trainer.profiling import Profiling, StepProfiler
from trainer.settings import Logging
from trainer.trackers import Spared, TensorBoard, Wandb, check_wandb_login

Config = Mapping[str, Any]


def sections(config: Config, ranks: int) -> tuple[Logging, Profiling]:
    """`logging` and `trainer.profile` of a run on so many ranks. Raises ConfigError."""
    profiling: Profiling = call(Profiling, config["trainer"]["profile"], "trainer.profile")
    if any(not 0 <= rank < ranks for rank in profiling.ranks):
        raise ConfigError(
            f"trainer.profile.ranks={profiling.ranks}: the run has {ranks}; "
            f"allowed: 0 to {ranks - 1}"
        )
    return call(Logging, config["logging"], "logging"), profiling


def check_sinks(config: Config, mesh: Mesh, run_dir: Path) -> None:
    """Raises ConfigError, on every rank, for what would be refused when all else is there."""
    wanted, _ = sections(config, mesh.ranks)
    online = wanted.wandb == "online"
    Ranks(mesh.group).first(lambda: check_wandb_login(run_dir) if online else None)


def build_sinks(trainer: Trainer, config: Config, run_dir: Path) -> list[Sink]:
    """Files, trackers and console of the main process; profiles on the ranks that write one."""
    wanted, profiling = sections(config, trainer.mesh.ranks)
    rank, done, sinks = trainer.mesh.rank, trainer.step, list[Sink]()
    if trainer.mesh.main:
        sinks.append(MetricsFile(run_dir / "metrics.jsonl", last_step=done))
        if wanted.tensorboard:
            sinks.append(Spared(TensorBoard(run_dir)))
        if wanted.wandb != "off":
            keys: dict[str, Any] = {"mode": wanted.wandb, "project": wanted.project}
            sinks.append(Spared(Wandb(run_dir, config=config, **keys)))
        sinks.append(Console(steps=trainer.steps, first=done, every=wanted.every))
    if profiling.steps is not None and rank in profiling.ranks:
        folder = run_dir / "profile"
        sinks.append(StepProfiler(folder=folder, steps=profiling.steps, rank=rank, done=done))
    return sinks
