"""Starts, kills and restarts tiny runs, and holds every restart to the uninterrupted run."""

import json
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tests.kills import child
from tests.kills.child import POINTS, RANDOM, Kill
from tests.launch import FORKSERVER, places
from tests.trainer.tiny import config as tiny_config
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.shards import TensorReader
from trainer.checkpoint.store import CheckpointStore

STEPS, EVERY = 12, 2
KILLS_PER_RUN = 5  # then it is left to reach its end
MISSES = 5  # in a row, e.g. where a run has too few saves ahead of it
MANY = 100  # trials, a quarter of them at random times
PATIENCE = 60.0  # seconds until a start counts as hanging


class Broken(AssertionError):
    """A restart did not go on as if there had been no kill."""


@dataclass
class Report:
    kills: Counter[str] = field(default_factory=Counter)  # by point, mode and victims
    missed: int = 0  # starts that reached the end before their kill
    random_in_save: int = 0  # random kills that found a save under way
    runs_ended_alike: int = 0  # with the records and the state of the uninterrupted one
    steps_lost: Counter[int] = field(default_factory=Counter)  # recorded, and done again
    slowest_end: float = 0.0  # seconds from a kill to the end of the ranks that were left
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {"total": sum(self.kills.values())} | {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else round(value, 2)
            for name, value in vars(self).items()
        }


class Harness:
    """Raises Broken as soon as anything is not as it must be."""

    def __init__(
        self, folder: Path, ranks: int, *, seed: int = 0, overrides: Sequence[str] = ()
    ) -> None:
        """overrides: of the configuration of every run."""
        self.folder, self.ranks = folder, ranks
        self.report = Report()
        self._random = random.Random(seed)
        self._starts = 0
        small = ["model.pattern=[kda,mla]", "model.num_layers=2"]
        options = [*small, f"trainer.steps={STEPS}", f"checkpoint.every={EVERY}"]
        options += ["parallel.timeout_minutes=1"]
        self._config = tiny_config(folder, *options, *overrides)
        self._run_dir = folder / "reference"
        self._start(None)
        self._reference = _records(self._run_dir)
        self._step_seconds = statistics.median(record["seconds"] for record in self._reference)
        self._end = _tensors(self._run_dir)
        self._run_dir = folder / "run"

    def run(self, trials: int) -> Report:
        start = time.monotonic()
        for trial, (background, point) in enumerate(self._plan(trials)):
            if trial % KILLS_PER_RUN == 0:
                self._renew()
                print(f"{trial} kills", file=sys.stderr, flush=True)
            options = {"background": background, "keep": self._random.choice([1, 2])}
            self._config["checkpoint"] |= options
            misses = 0
            while not self._trial(background, self._kill(point)):
                self._renew()
                misses += 1
                if misses > MISSES:
                    raise Broken(f"no kill at {point} lands; {self.report.summary()}")
        self._renew()
        if trials >= MANY and not self.report.random_in_save:
            raise Broken(f"no random kill found a save under way; {self.report.summary()}")
        self.report.seconds = time.monotonic() - start
        return self.report

    def _renew(self) -> None:
        """Lets the run reach its end, and begins another."""
        if self._run_dir.exists():
            self._start(None)
            self._check_end()
        self._run_dir = self.folder / f"run{self._starts}"

    def _plan(self, trials: int) -> Iterator[tuple[bool, str]]:
        """Each point once and two random kills in a block, blocks alternately in either mode."""
        points = [*POINTS, RANDOM, RANDOM]
        for trial in range(trials):
            block, place = divmod(trial, len(points))
            if place == 0:
                self._random.shuffle(points)
            yield block % 2 == 0, points[place]

    def _kill(self, point: str) -> Kill:
        everyone = tuple(range(self.ranks))
        most = {"shard": 100, RANDOM: STEPS - 2 * EVERY}.get(point, 2)
        return Kill(
            point,
            victims=self._random.choice([everyone, (self._random.choice(everyone),)]),
            actor=self._random.choice(everyone) if point == "shard" else 0,
            occurrence=self._random.randint(1, most),
            delay=self._random.uniform(0, 2 * self._step_seconds),
        )

    def _trial(self, background: bool, kill: Kill) -> bool:
        """-> whether the kill landed; the run has reached its end if not."""
        if not self._start(kill):
            self.report.missed += 1
            return False
        scope = "one" if len(kill.victims) == 1 else "all"
        mode = "background" if background else "sync"
        self.report.kills[f"{kill.point} {mode} {scope}"] += 1
        records = self._check_records()
        lost = (records[-1]["step"] if records else 0) - self._newest_step()
        self.report.steps_lost[lost] += 1
        if lost > EVERY * (2 if background else 1):  # an interval, and the save in flight
            raise Broken(f"{self._run_dir}: {lost} steps lost by {kill}")
        return True

    def _start(self, kill: Kill | None) -> bool:
        """Trains from where the run is; -> whether the kill landed, else it reached its end."""
        folder = self.folder / f"start{self._starts}"
        self._starts += 1
        folder.mkdir()
        self._run_dir.mkdir(exist_ok=True)
        self._config["run_dir"] = str(self._run_dir)
        newest = self._newest_step()
        processes = [
            FORKSERVER.Process(target=child.run, args=(folder, place, self._config, kill))
            for place in places(self.ranks)
        ]
        for process in processes:
            process.start()
        try:
            struck = self._await(processes, folder, kill, newest)
        finally:
            for process in processes:
                process.kill()
        resumed = [int(path.read_text()) for path in folder.glob("resumed*")]
        if any(step != newest for step in resumed):
            raise Broken(f"{folder}: resumed from {resumed}, the newest checkpoint is {newest}")
        codes = [process.exitcode for process in processes]
        if kill is not None and kill.point == RANDOM and -signal.SIGKILL not in codes:
            struck = None  # the processes were just ending
        if any(codes) if struck is None else -signal.SIGKILL not in codes:
            raise Broken(f"{folder}: ended with {codes}; {kill}")
        if struck is not None:
            self.report.slowest_end = max(self.report.slowest_end, time.monotonic() - struck)
        return struck is not None

    def _await(
        self, processes: list[BaseProcess], folder: Path, kill: Kill | None, first: int
    ) -> float | None:
        """Until all, which go on from step `first`, have ended; -> when they were struck, if so."""
        deadline = time.monotonic() + PATIENCE
        struck = None
        if kill is not None and kill.point == RANDOM:
            struck = self._strike_at_random(processes, folder, kill, first + kill.occurrence)
        while any(process.is_alive() for process in processes):
            if time.monotonic() > deadline:
                raise Broken(f"{folder}: hangs; {kill}")
            if struck is None and (folder / "landed").exists():
                struck = time.monotonic()
            time.sleep(0.005)
        if kill is not None and kill.point == RANDOM and struck is not None:
            self.report.random_in_save += any((self._run_dir / "checkpoints").glob(".step_*"))
        return time.monotonic() if struck is None and (folder / "landed").exists() else struck

    def _strike_at_random(
        self, processes: list[BaseProcess], folder: Path, kill: Kill, last: int
    ) -> float | None:
        """Behind the record of step `last`; -> when; None if the ranks have ended before."""
        resumed = folder / "resumed0"  # later records are cut by then
        while all(process.is_alive() for process in processes):
            if resumed.exists() and len(_records(self._run_dir)) >= last:
                break
            time.sleep(0.002)
        time.sleep(kill.delay)
        if not all(process.is_alive() for process in processes):
            return None
        for rank in kill.victims:
            processes[rank].kill()
        return time.monotonic()

    def _newest_step(self) -> int:
        """Of the checkpoints; each that has its name must be whole."""
        folder = CheckpointFolder(self._run_dir / "checkpoints")
        newest = CheckpointStore(folder.path).resolve("auto")
        steps = folder.steps()
        if steps and newest != folder.checkpoint(steps[-1]):
            raise Broken(f"{folder.path}: {steps[-1]} is there, {newest} would be taken")
        return steps[-1] if steps else 0

    def _check_end(self) -> None:
        """Records and state are those of the uninterrupted run, to the bit."""
        if len(self._check_records()) != STEPS:
            raise Broken(f"{self._run_dir}: ended early")
        for name, tensor in _tensors(self._run_dir).items():
            if not torch.equal(tensor, self._end[name]):
                raise Broken(f"{self._run_dir}: {name} is not that of the uninterrupted run")
        self.report.runs_ended_alike += 1
        shutil.rmtree(self._run_dir)

    def _check_records(self) -> list[dict]:
        records = _records(self._run_dir)
        for record, reference in zip(records, self._reference, strict=False):
            for key in ("step", "loss", "grad_norm", "lr", "tokens", "epoch"):
                if record[key] != reference[key]:
                    raise Broken(f"{self._run_dir}: {record} instead of {reference}")
        return records


def _records(run_dir: Path) -> list[dict]:
    """Of the lines that are whole."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and optimiser of the last step."""
    reader = TensorReader(run_dir / "checkpoints" / f"step_{STEPS:08}")
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in entries.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
