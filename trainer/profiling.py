"""Where the time and memory of a few steps go: a trace for chrome://tracing or Perfetto, and on
CUDA a snapshot of the allocator for pytorch.org/memory_viz."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.metrics import Record

log = logging.getLogger(__name__)

_ALLOCATIONS = 100_000  # the newest ones, with their stacks


@dataclass(frozen=True, kw_only=True)
class Profiling:
    """The section `trainer.profile`: the first and last step, and the ranks that write."""

    steps: tuple[int, int] | None
    ranks: list[int]

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps is {list(self.steps)}; allowed: [first, last] from 1 up, null")


class StepProfiler:
    """A sink: takes part behind every step, and profiles `steps`, saving and evaluation included.

    A run that ends in between writes what there is. Steps repeated by a rollback are not repeated
    here.
    """

    def __init__(self, *, folder: Path, steps: Sequence[int], rank: int, done: int) -> None:
        """done: steps already taken. Profiling starts late if these are among `steps`."""
        self.folder, self.rank = folder, rank
        self.first, self.last = max(steps[0], done + 1), steps[1]
        self._profile: profile | None = None
        if self.first == done + 1 <= self.last:
            self._start()

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        if self._profile is not None and step >= self.last:
            self.close()
        elif self._profile is None and step + 1 == self.first:
            self._start()

    def close(self) -> None:
        """Writes what was seen, if it was not written before."""
        done, self._profile = self._profile, None
        if done is None:
            return
        done.stop()
        self.first = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace_rank{self.rank:05}.json"
        done.export_chrome_trace(str(trace))
        if torch.cuda.is_available():
            memory = self.folder / f"memory_rank{self.rank:05}.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile in %s", self.folder)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()
