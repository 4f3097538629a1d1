"""The evaluation of a run while it trains: its tasks, one after the other."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.evals.task import Bench, Figures, Result, Task

log = logging.getLogger(__name__)


class Evaluated(NamedTuple):
    """figures: by the name they have in metrics.jsonl; pictures: by the task's name."""

    figures: Figures
    pictures: dict[str, Path]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """tasks: by name; folder: for pictures, which the main process draws."""

    tasks: Mapping[str, Task]
    bench: Bench
    folder: Path

    def names(self) -> list[str]:
        """Of all its figures."""
        seq_len = self.bench.data.seq_len
        return [
            figure_name(task, figure)
            for task, made in self.tasks.items()
            for figure in made.names(seq_len)
        ]

    def check(self) -> None:
        """Raises ConfigError for what would end the first evaluation."""
        for task in self.tasks.values():
            task.check(self.bench)

    def run(self, step: int, before: Callable[[], None]) -> Evaluated:
        """Collective; `before` is called ahead of every batch, what it raises ends it all."""
        self.bench.scorer.before = before
        figures: Figures = {}
        pictures: dict[str, Path] = {}
        for name, task in self.tasks.items():
            result = task.run(self.bench)
            figures |= {figure_name(name, key): x for key, x in result.figures.items()}
            if result.draw is not None and self.bench.mesh.main:
                path = self.folder / f"{name}_step_{step:08}.png"
                if draw(result, path):
                    pictures[name] = path
        return Evaluated(figures, pictures)


def figure_name(task: str, figure: str) -> str:
    """eval_loss and so on for the task that every run has, eval_<task>_<figure> for others."""
    return f"eval_{figure}" if task == "perplexity" else f"eval_{task}_{figure}"


def draw(result: Result, path: Path) -> bool:
    """Whether the picture is there; a disk that is full does not end a run."""
    assert result.draw is not None
    try:
        result.draw(path)
    except OSError as error:
        log.warning("no picture %s: %s", path, error.strerror)
        return False
    return True
