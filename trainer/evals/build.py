"""From names of tasks and the section `tasks` to what runs them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.construct import construct
from trainer.errors import ConfigError
from trainer.evals.suite import Suite
from trainer.evals.task import Bench, Task
from trainer.settings import Evaluation

APART = ("lm_eval",)  # needs a model that is whole, and minutes: not while training


def build_task(name: str, sections: Mapping[str, Any], key: str = "task") -> Task:
    """sections: the section `tasks`; key: where the name stands. Raises ConfigError."""
    if name not in sections:
        raise ConfigError(f"{key}={name}: allowed: {', '.join(sorted(sections))}")
    return construct(sections[name], f"tasks.{name}")


def build_tasks(names: Sequence[str], sections: Mapping[str, Any]) -> dict[str, Task]:
    """Of a run, eval.tasks."""
    among = {name: section for name, section in sections.items() if name not in APART}
    return {name: build_task(name, among, "eval.tasks") for name in names}


def build_suite(
    evaluation: Evaluation, sections: Mapping[str, Any], bench: Bench, folder: Path
) -> Suite:
    """What a run evaluates while it trains, if it does; pictures go to folder."""
    suite = Suite(tasks=build_tasks(evaluation.tasks, sections), bench=bench, folder=folder)
    if evaluation.every:
        suite.check()
    return suite
