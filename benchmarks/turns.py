"""Whole training runs against each other, a step of each in turn, on a machine that is not quiet:
python -m benchmarks.turns common="model=kimi_linear data.seq_len=8192" one="" ring="parallel=ring"

Each further NAME="overrides" is a run, the first of which the others are held to: of one process
with `threads` (default 2) threads where it chooses no `parallel`, else of as many ranks of one
thread. All runs start, and are stopped (SIGSTOP) behind their second step; then each goes on for a
step while the others are stopped, `rounds` (default 9) times, forwards and backwards in turn. What
else the machine does thus meets all of them alike, and a ratio is of the same rows at the same
time. `runs` is a new folder for the runs, `output` a file for the results.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.job import ROOT
from benchmarks.machine import facts
from benchmarks.report import Column, Row, table, write
from trainer.launch import children

WARM = 2  # steps before the first turn


class Runner:
    """A run that goes on only in its turns."""

    def __init__(self, folder: Path, overrides: Sequence[str], threads: int) -> None:
        self.folder = folder
        shared = any(word.startswith("parallel=") for word in overrides)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={threads}"]
        launcher = torchrun if shared else []
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "scripts/train.py", *overrides, f"run_dir={folder}"],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(1 if shared else threads)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def records(self) -> list[Row]:
        metrics = self.folder / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def turn(self, steps: int) -> float:
        """Until that many steps are recorded; -> seconds. Raises RuntimeError if the run ends."""
        start = time.perf_counter()
        self._send(signal.SIGCONT)
        while len(self.records()) < steps:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.folder.name} ended; see {self.folder}.log")
            time.sleep(0.01)
        took = time.perf_counter() - start
        self._send(signal.SIGSTOP)
        return took

    def end(self) -> None:
        self._send(signal.SIGKILL)
        self._process.wait()

    def _send(self, number: signal.Signals) -> None:
        """To the process and all below it."""
        family = [self._process.pid]
        for pid in family:
            family += children(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def take_turns(runners: Sequence[Runner], rounds: int) -> list[list[float]]:
    """-> by runner, seconds of each step."""
    took: list[list[float]] = [[] for _ in runners]
    for done in range(rounds):
        pairs = list(zip(runners, took, strict=True))
        for runner, own in pairs if done % 2 == 0 else reversed(pairs):
            own.append(runner.turn(WARM + done + 1))
        print(f"round {done + 1}/{rounds}", file=sys.stderr, flush=True)
    return took


def row(name: str, runner: Runner, took: Sequence[float], first: Sequence[float]) -> Row:
    """ratio: of throughput to that of the first run, the median of steps."""
    records = runner.records()[WARM : WARM + len(took)]
    return {
        "run": name,
        "seconds": list(took),
        "tokens_per_s": sum(record["tokens"] for record in records) / sum(took),
        "ratio": median(other / own for other, own in zip(first, took, strict=True)),
        "peak_memory_gib": max(record["peak_memory_gib"] for record in records),
        "comm_mb": sum(record.get("comm_bytes", 0) for record in records) / len(records) / 1e6,
    }


def main(arguments: Sequence[str]) -> None:
    options = dict(word.split("=", 1) for word in arguments)
    rounds, threads = int(options.pop("rounds", 9)), int(options.pop("threads", 2))
    common, output = options.pop("common", ""), options.pop("output", "")
    runs = Path(options.pop("runs", "") or Path(tempfile.mkdtemp(), "turns")).absolute()
    runs.mkdir(parents=True)
    rows = measure(options, runs, f"{common} trainer.steps={WARM + rounds + 1}", rounds, threads)
    columns = [
        Column("run", "run"),
        Column("tokens_per_s", "tokens/s", ",.0f"),
        Column("ratio", "ratio", ".3f"),
        Column("peak_memory_gib", "peak a rank, GiB", ".2f"),
        Column("comm_mb", "received a rank and step, MB", ".1f"),
    ]
    print(table(rows, columns))
    if output:
        command = f"python -m benchmarks.turns {' '.join(map(repr, arguments))}"
        write(Path(output), {**facts("cpu", threads, command), "rows": rows})


def measure(
    jobs: Mapping[str, str], runs: Path, common: str, rounds: int, threads: int
) -> list[Row]:
    """One run after the other is started, as each takes its first turn."""
    runners: list[Runner] = []
    try:
        for name, words in jobs.items():
            runners.append(Runner(runs / name, [*common.split(), *words.split()], threads))
            runners[-1].turn(WARM)
        took = take_turns(runners, rounds)
        return [
            row(name, runner, own, took[0])
            for name, runner, own in zip(jobs, runners, took, strict=True)
        ]
    finally:
        for runner in runners:
            runner.end()


if __name__ == "__main__":
    main(sys.argv[1:])
