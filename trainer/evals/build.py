"""From names of tasks and the section `tasks` to what runs them."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.construct import construct
from trainer.data import Data
from trainer.errors import ConfigError
from trainer.evals.suite import Suite
from trainer.evals.task import Bench, Task
from trainer.settings import Evaluation

APART = ("lm_eval",)  # needs a model that is whole, and minutes: not while training
WHOLE = ("lm_eval", "perplexity")  # not made of the documents of one source

log = logging.getLogger(__name__)


def build_task(name: str, sections: Mapping[str, Any], key: str = "task") -> Task:
    """sections: the section `tasks`; key: where the name stands. Raises ConfigError."""
    if name not in sections:
        raise ConfigError(f"{key}={name}: allowed: {', '.join(sorted(sections))}")
    return construct(sections[name], f"tasks.{name}")


def build_tasks(
    names: Sequence[str], sections: Mapping[str, Any], *, planned: bool
) -> dict[str, Task]:
    """Of a run, eval.tasks; planned: whether there is a token store to make examples of."""
    made_of_text = [name for name in names if name != "perplexity"]
    if made_of_text and not planned:
        raise ConfigError(
            f"eval.tasks={list(names)}: all but perplexity are made of a token store, of which "
            "data.streaming=true has none; allowed: [perplexity], or data.streaming=false"
        )
    among = {name: section for name, section in sections.items() if name not in APART}
    return {name: build_task(name, among, "eval.tasks") for name in names}


def build_suite(
    evaluation: Evaluation, sections: Mapping[str, Any], bench: Bench, folder: Path
) -> Suite:
    """What a run evaluates while it trains, if it does; pictures go to folder."""
    planned = isinstance(bench.data, Data)
    tasks = build_tasks(evaluation.tasks, sections, planned=planned)
    on = {
        name: benches(name, tasks[name], bench) if evaluation.every else {"": bench}
        for name in tasks
    }
    return Suite(
        tasks={name: (task, on[name]) for name, task in tasks.items()}, bench=bench, folder=folder
    )


def benches(name: str, task: Task, bench: Bench) -> dict[str, Bench]:
    """What the task of that name is run on, by source: each source of a mixture that has what the
    task needs; without a mixture, or for what is not made of documents, "" alone.

    Raises ConfigError if nothing has.
    """
    corpora = bench.data.corpora if isinstance(bench.data, Data) and name not in WHOLE else [""]
    found: dict[str, Bench] = {}
    refused: dict[str, ConfigError] = {}
    for source in corpora:
        own = dataclasses.replace(bench, source=source)
        try:
            task.check(own)
            found[source] = own
        except ConfigError as error:
            refused[source] = error
    if not found:
        raise next(iter(refused.values()))
    for source, reason in refused.items():
        log.info("eval    %s leaves out source %s: %s", name, source, reason)
    return found
