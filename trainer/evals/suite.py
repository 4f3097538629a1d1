"""The evaluation of a run while it trains: its tasks, one after the other."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainer.evals.task import Bench, Figures, Result, Task

log = logging.getLogger(__name__)


class Evaluated(NamedTuple):
    """figures: by the name they have in metrics.jsonl; pictures: by task and source."""

    figures: Figures
    pictures: dict[str, Path]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """tasks: by name, with the benches of `build.benches`; bench: of all documents; folder: for
    pictures, which the main process draws."""

    tasks: Mapping[str, tuple[Task, Mapping[str, Bench]]]
    bench: Bench
    folder: Path

    def names(self) -> list[str]:
        """Of all its figures."""
        seq_len = self.bench.data.seq_len
        return [
            figure_name(name, source, figure)
            for name, (task, benches) in self.tasks.items()
            for source in benches
            for figure in task.names(seq_len)
        ]

    def run(self, step: int, before: Callable[[], None]) -> Evaluated:
        """Collective; `before` is called ahead of every batch, what it raises ends it all."""
        self.bench.scorer.before = before
        figures: Figures = {}
        pictures: dict[str, Path] = {}
        for name, (task, benches) in self.tasks.items():
            for source, bench in benches.items():
                result = task.run(bench)
                named = {figure_name(name, source, key): x for key, x in result.figures.items()}
                figures |= named
                shown = joined(name, source)
                path = self.folder / f"{shown}_step_{step:08}.png"
                if result.draw is not None and bench.mesh.main and draw(result, path):
                    pictures[shown] = path
        return Evaluated(figures, pictures)


def figure_name(task: str, source: str, figure: str) -> str:
    """eval_loss and so on for the task that every run has, eval_<task>_<figure> for others, with
    the source of a mixture between them."""
    return joined("eval", "" if task == "perplexity" else task, source, figure)


def joined(*names: str) -> str:
    return "_".join(filter(None, names))


def draw(result: Result, path: Path) -> bool:
    """Whether the picture is there; a disk that is full does not end a run."""
    assert result.draw is not None
    try:
        result.draw(path)
    except OSError as error:
        log.warning("no picture %s: %s", path, error.strerror)
        return False
    return True
