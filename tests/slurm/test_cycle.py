"""Whole lives of jobs in a real Slurm of two nodes: pytest -m slurm tests/slurm (some minutes)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import ROOT, torchrun
from tests.slurm.cluster import cluster, missing
from tests.trainer.tiny import overrides
from trainer.slurm import attempts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

STEPS = 200
EVERY = 20  # steps between checkpoints
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "epoch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a Slurm that runs as long as the tests of this file do."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("slurm")):
        yield tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder) -> list[dict]:
    """The records of a run on two ranks that nothing interrupts."""
    torchrun(2, "scripts/train.py", *training(folder, "whole"))
    return records(folder / "whole")


def training(folder: Path, name: str) -> list[str]:
    return overrides(
        folder,
        f"trainer.steps={STEPS}",
        f"checkpoint.every={EVERY}",
        f"logging.every={EVERY}",
        f"run_dir={folder / name}",
    )


def submit(folder: Path, name: str, *more: str) -> str:
    """-> the id of a job that trains on two nodes, in folder/name."""
    keys = ["nodes=2", "partition=low", "time=60", "cluster.endpoint=127.0.0.1"]
    keys += ["+cluster.environment.OMP_NUM_THREADS=1", *training(folder, name), *more]
    command = [sys.executable, "scripts/slurm/submit.py", *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[2].rstrip(":")


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def noted(run_dir: Path, event: str) -> list[dict]:
    path = run_dir / attempts.FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == event]


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def state(job: str) -> str:
    """PENDING, RUNNING, COMPLETED, FAILED, ..."""
    facts = slurm("scontrol", "show", "job", job)
    return facts.split("JobState=")[1].split()[0]


def wait_for(condition: Callable[[], bool], run_dir: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = [path.read_text()[-4000:] for path in run_dir.glob("*.log")]
            raise AssertionError("\n".join(["not in time", slurm("squeue", "--long"), *logs]))
        time.sleep(0.2)


def workers(run_dir: Path) -> dict[int, int]:
    """Rank -> process of train.py at this run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environ = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run_dir={run_dir}".encode() in words:
            ranks = [int(pair[5:]) for pair in environ if pair.startswith(b"RANK=")]
            found |= {rank: int(path.name) for rank in ranks}
    return found


def is_whole(run_dir: Path, whole: list[dict]) -> bool:
    """Whether every step was taken once, bitwise as in the run that nothing interrupted."""
    assert json.loads((run_dir / "status.json").read_text())["outcome"] == "done"
    taken = [{key: record[key] for key in COMPARED} for record in records(run_dir)]
    return taken == [{key: record[key] for key in COMPARED} for record in whole]


def test_preempted_requeued_and_resumed_to_the_end(folder, whole):
    run_dir = folder / "preempted"
    job = submit(folder, "preempted")
    wait_for(lambda: len(records(run_dir)) > 1.5 * EVERY, run_dir)
    high = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--time=1"]
    urgent = slurm(*high, f"--output={folder / 'urgent.log'}", "--wrap=sleep 3").strip()
    wait_for(lambda: bool(noted(run_dir, "end")), run_dir)
    first = noted(run_dir, "end")[0]
    assert first["requeue"] and first["why"] == "stopped, to be resumed"
    wait_for(lambda: state(job) == "COMPLETED", run_dir)
    assert state(urgent) == "COMPLETED"
    begun = [line["step"] for line in noted(run_dir, "begin")]
    assert begun[0] == 0 and begun[1] == first["step"] > EVERY and len(begun) == 2
    assert first["step"] % EVERY, "stopped where it would have saved anyway"
    assert noted(run_dir, "end")[1]["why"] == "done"
    assert is_whole(run_dir, whole)
    log = (run_dir / f"preempted_{job}.log").read_text()
    assert "attempt 1 of job" in log and "attempt 2 of job" in log


def test_a_killed_rank_costs_one_interval(folder, whole):
    run_dir = folder / "killed"
    job = submit(folder, "killed")
    wait_for(lambda: len(records(run_dir)) > 1.5 * EVERY, run_dir)
    os.kill(workers(run_dir)[1], signal.SIGKILL)
    wait_for(lambda: bool(noted(run_dir, "end")), run_dir)
    first = noted(run_dir, "end")[0]
    reason = first["why"].removeprefix("failed: ")
    assert first["requeue"] and reason.startswith(attempts.ACCIDENTS), reason
    wait_for(lambda: state(job) == "COMPLETED", run_dir)
    assert [line["step"] for line in noted(run_dir, "begin")][1] % EVERY == 0
    assert is_whole(run_dir, whole)


def test_a_time_limit_is_met_with_a_checkpoint_and_a_cancelled_job_stays_so(folder):
    run_dir = folder / "limited"
    job = submit(folder, "limited", "time=2", "signal_seconds=30", "trainer.steps=1000000")
    wait_for(lambda: len(noted(run_dir, "begin")) == 2, run_dir)
    (first,) = noted(run_dir, "end")
    assert first["requeue"] and first["why"] == "stopped, to be resumed"
    assert first["step"] == noted(run_dir, "begin")[1]["step"] > 0
    wait_for(lambda: bool(workers(run_dir)), run_dir)
    slurm("scancel", job)
    wait_for(lambda: state(job) == "CANCELLED" and not workers(run_dir), run_dir)
    time.sleep(10)
    assert state(job) == "CANCELLED"


def test_a_job_that_gets_nowhere_is_given_up(folder):
    run_dir = folder / "nowhere"
    job = submit(folder, "nowhere", "cluster.python=/bin/false")
    wait_for(lambda: state(job) == "FAILED", run_dir)
    ends = noted(run_dir, "end")
    assert [line["requeue"] for line in ends] == [True, True, False]
    assert ends[-1]["why"].endswith("no new checkpoint in 3 attempts in a row")
