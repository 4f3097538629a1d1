"""Signals, lost ranks and policies: all ranks end alike, and say why."""

import json
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from parallel.mesh import Mesh
from tests.launch import TORCHRUN, forked, start
from tests.trainer.tiny import QUICK, overrides, records
from trainer.run_folder import session

COMMON = [
    *QUICK,
    "trainer.micro_batch_size=1",
    "trainer.precision=fp64",
    "trainer.steps=6",
    "schedule.total_steps=6",
]
HOST = os.uname().nodename
BITWISE = ("step", "loss", "grad_norm", "lr", "tokens", "epoch")


def launch(folder: Path, *jobs: dict, ranks: int = 2) -> BaseProcess:
    """torchrun; lines of errors go to folder/ranks.2."""
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", "-m", "tests.trainer.faulty"]
    environment, output = {"OMP_NUM_THREADS": "1"}, folder / "ranks"
    return start(environment, output, "tests.launchers", *command, str(folder), json.dumps(jobs))


def job(folder: Path, name: str, *more: str, faults: list | None = None) -> dict:
    made = [o for o in overrides(folder) if not o.startswith(("run_dir", "trainer.steps"))]
    arguments = [*made, *COMMON, f"run_dir={folder / name}", *more]
    return {"overrides": arguments, "faults": faults or []}


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def errors(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith("error: "))


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def gone(pid_file: Path) -> bool:
    """Whether the process is, whose parent may be this container's first, which reaps late."""
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


EVALUATING = ["eval.every=2", "data.eval_fraction=0.6"]
ROLLBACK = ["trainer.nonfinite=rollback", "trainer.rollback_steps=1", "checkpoint.every=2"]
STOPPED = {  # job -> its options, its faults, its last step, its signal
    "step": ([], [[1, "DDPEngine", "step", 3, "SIGUSR1"]], 3, "SIGUSR1"),
    "build": ([], [[1, "Trainer", "__init__", 1, "SIGTERM"]], 0, "SIGTERM"),
    "evaluation": (EVALUATING, [[0, "Engine", "evaluate", 3, "SIGTERM"]], 2, "SIGTERM"),
    "save": (
        ["checkpoint.every=2"],
        [
            [1, "CheckpointStore", "save", 1, "SIGUSR2"],
            [0, "CheckpointStore", "save", 1, "SIGTERM"],
        ],
        2,
        "SIGTERM",
    ),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Each job of STOPPED, and once more to its end, where it stopped in a step; other jobs."""
    folder = tmp_path_factory.mktemp("stopped")
    jobs = {"whole": job(folder, "whole")}
    for name, (more, faults, _, _) in STOPPED.items():
        jobs[name] = job(folder, name, *more, faults=faults)
    jobs["again"] = job(folder, "step")
    nan = [[1, "LanguageModelLoss", "forward", 8, "nan"]]  # of two a step
    jobs["skip"] = job(folder, "skip", "trainer.nonfinite=skip", faults=nan)
    jobs["rollback"] = job(folder, "rollback", *ROLLBACK, faults=nan)
    jobs["killed"] = job(folder, "killed", faults=[[1, "DDPEngine", "step", 2, "SIGKILL"]])
    launch(folder, *jobs.values()).join(200)
    codes = {
        name: [path.read_text() for path in sorted(folder.glob(f"{i}.?"))]
        for i, name in enumerate(jobs)
    }
    return folder, codes


@pytest.mark.parametrize("name", STOPPED)
def test_a_signal_to_one_rank_stops_all_at_one_place(stopped, name):
    folder, codes = stopped
    assert codes[name] == ["75", "75"]
    if name != "step":  # which went on
        _, _, step, number = STOPPED[name]
        end = {"outcome": "stopped", "signal": number, "step": step}
        assert status(folder / name).items() >= end.items()
        saved = sorted(path.name for path in (folder / name / "checkpoints").glob("step_*"))
        assert saved == ([f"step_{step:08}"] if step else [])
        assert [r["step"] for r in records(folder / name)] == list(range(1, step + 1))
        assert all("eval_loss" not in record for record in records(folder / name))


def test_the_resumed_run_is_bitwise_the_uninterrupted_one(stopped):
    folder, codes = stopped
    assert codes["again"] == codes["whole"] == ["0", "0"]
    assert "SIGUSR1: stopping behind step 3" in (folder / "step" / "train.log").read_text()
    whole, resumed = records(folder / "whole"), records(folder / "step")
    for key in BITWISE:
        assert [r[key] for r in resumed] == [r[key] for r in whole], key


@pytest.mark.parametrize(("name", "batches"), [("skip", 6), ("rollback", 8)])
def test_what_one_rank_finds_bad_no_rank_takes(stopped, name, batches):
    """In step 4: the rollback goes to step 2 and leaves out the batches of steps 3 and 4."""
    folder, codes = stopped
    assert codes[name] == ["0", "0"]
    (line,) = (folder / name / "bad_batches.jsonl").read_text().splitlines()
    bad = json.loads(line)
    assert (bad["step"], bad["action"], bad["loss"]) == (4, name, None)
    assert [len(part) for part in bad["batches"]] == [2, 2]
    lines = records(folder / name)
    assert [r["step"] for r in lines if "skipped" in r] == ([4] if name == "skip" else [])
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    checkpoint = folder / name / "checkpoints" / "step_00000006"
    stream = json.loads((checkpoint / "progress.json").read_text())["stream"]
    assert stream["cursor"] == batches


def test_the_launchers_signal_behind_a_death_is_no_stop_to_resume_from(stopped):
    """torchrun sends SIGTERM to the rank that is left."""
    folder, codes = stopped
    assert codes["killed"] == ["1"]
    reason = f"lost rank 1 on {HOST}: its process ended"
    assert errors((folder / "ranks.2").read_text()) == [f"error: rank 0: {reason}"]
    assert status(folder / "killed").items() >= {"outcome": "failed", "reason": reason}.items()
    assert not list((folder / "killed" / "checkpoints").glob("step_*"))


SLEEPING = [0, "DDPEngine", "accumulate", 5, "sleep"]


def test_a_rank_that_is_killed_is_named_by_one_that_computes(tmp_path):
    """With no launcher that would end it."""
    faults = [SLEEPING, [1, "DDPEngine", "accumulate", 5, "die"]]
    jobs = json.dumps([job(tmp_path, "run", faults=faults)])
    left, killed = forked(2, "tests.trainer.faulty", str(tmp_path), jobs)
    assert (left.returncode, killed.returncode) == (1, -signal.SIGKILL)
    reason = f"lost rank 1 on {HOST}: its process ended"
    assert errors(left.stderr) == [f"error: rank 0: {reason}"]
    assert status(tmp_path / "run").items() >= {"outcome": "failed", "reason": reason}.items()
    times = [(tmp_path / file).stat().st_mtime for file in ("died", "run/status.json")]
    assert times[1] - times[0] < 6  # 2 s on a machine that does nothing else


def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    alone = job(tmp_path, "run", "trainer.micro_batch_size=2", faults=[SLEEPING])
    launcher = launch(tmp_path, alone, ranks=1)
    wait_for((tmp_path / "asleep").exists, 100)
    launcher.kill()
    launcher.join()
    wait_for(lambda: gone(tmp_path / "asleep"), 2)
    with session(tmp_path / "run", Mesh(device=torch.device("cpu"))) as status:  # it is free
        assert status.left.startswith("the run before ended without a word: process ")
        assert status.left.endswith(f" on {HOST}, behind step 1")


def test_a_rank_whose_storage_hangs_is_named_with_all_stacks(tmp_path):
    hanging = [1, "TrainStream", "next_step", 5, "sleep"]
    hangs = job(tmp_path, "run", "trainer.hang_minutes=0.06", faults=[hanging])
    ranks = forked(2, "tests.trainer.faulty", str(tmp_path), json.dumps([hangs]))
    assert [rank.returncode for rank in ranks] == [1, 1]
    where = (
        f"behind step 3: the others wait for rank 1 on {HOST}; stacks in {tmp_path}/run/hang_rank"
    )
    for rank in ranks:
        assert len(errors(rank.stderr)) == 1 and where in errors(rank.stderr)[0]
    assert where in status(tmp_path / "run")["reason"]
    assert "in befall" in (tmp_path / "run" / "hang_rank00001.txt").read_text()
    assert "in _count" in (tmp_path / "run" / "hang_rank00000.txt").read_text()
