"""The tasks of lm-evaluation-harness, through our own model; an optional installation."""

import logging
from collections.abc import Sequence
from typing import Any

from trainer.errors import ConfigError
from trainer.evals.task import Bench, Figures, Result

log = logging.getLogger(__name__)


class Harness:
    """tasks: names that the harness knows, also from YAML files in include_path; num_fewshot: null
    for what each task says; limit: examples of each task, null for all; max_length: of a context,
    whose end is taken, null for all of it. Raises ValueError.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        num_fewshot: int | None,
        limit: int | None,
        max_length: int | None,
        include_path: str | None,
    ) -> None:
        if not tasks:
            raise ValueError("tasks is []; allowed: names of tasks, e.g. [arc_easy,hellaswag]")
        for name, value, least in (
            ("num_fewshot", num_fewshot, 0),
            ("limit", limit, 1),
            ("max_length", max_length, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; allowed: {least} or more, or null")
        self.tasks, self.num_fewshot, self.limit = list(tasks), num_fewshot, limit
        self.max_length, self.include_path = max_length, include_path

    def names(self, seq_len: int) -> list[str]:
        return []  # only the harness knows

    def check(self, bench: Bench) -> None:
        self._manager()

    def run(self, bench: Bench) -> Result:
        """<task>_<metric>, and <task>_<metric>_<filter> where answers are filtered."""
        manager = self._manager()
        from lm_eval import simple_evaluate

        from trainer.evals.harness import HarnessModel

        model = HarnessModel(bench, max_length=self.max_length)
        found = simple_evaluate(
            model=model,
            tasks=list(self.tasks),
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=manager,
            log_samples=False,
        )
        if model.cut:
            log.warning("%d contexts were cut to %s tokens", model.cut, self.max_length)
        return Result(figures=flat(found["results"]))

    def _manager(self) -> Any:
        """The harness's own, that knows the tasks."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(
                f"task=lm_eval: {error}; allowed: with lm-eval installed, pip install -e '.[eval]'"
            ) from error
        manager = TaskManager(include_path=self.include_path)
        unknown = [name for name in self.tasks if not manager.match_tasks([name])]
        if unknown:
            raise ConfigError(
                f"tasks.lm_eval.tasks: the harness has no {unknown[0]}; allowed: what `lm_eval ls "
                "tasks` lists, or with tasks.lm_eval.include_path=FOLDER what its YAML files name"
            )
        return manager


def flat(results: dict[str, dict[str, Any]]) -> Figures:
    """Keys of the harness are `<metric>,<filter>`; what is no number is left out."""
    figures: Figures = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, how = key.partition(",")
            if how and isinstance(value, int | float):
                figures["_".join((task, metric, *([how] if how != "none" else [])))] = value
    return figures
