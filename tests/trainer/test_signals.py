"""A signal ends a run at its next safe place, with a checkpoint, and leaves how it ended."""

import json
import os
import signal
import sys

import pytest

from tests.trainer.tiny import QUICK, overrides, records
from trainer import main
from trainer.checkpoint.folder import CheckpointFolder
from trainer.console import close_logging
from trainer.engine import Engine
from trainer.loop import Trainer
from trainer.signals import StopSignals

COMMON = [*QUICK, "trainer.precision=fp64", "checkpoint.every=3", "schedule.total_steps=4"]


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Runs a command line in this process; -> exit code, standard output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def train(*more: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
        monkeypatch.setattr(
            sys, "argv", ["train.py", *before, *overrides(tmp_path, *COMMON, *more)]
        )
        with pytest.raises(SystemExit) as stop:
            main.command("train", main.train)
        return stop.value.code, capfd.readouterr().out

    yield train
    close_logging()


@pytest.fixture
def send(monkeypatch):
    """Sends this process a signal at the `call`th call of a method, before it does its work."""

    def send(owner: type, method: str, *signals: int, call: int = 1) -> None:
        work, calls = getattr(owner, method), []

        def watched(*args, **kwargs):
            calls.append(method)
            for number in signals if len(calls) == call else ():
                os.kill(os.getpid(), number)
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, method, watched)

    return send


def status(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "status.json").read_text())


def checkpoints(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_step_is_finished_and_saved(train, send, tmp_path, number):
    send(Engine, "step", number, call=2)
    code, out = train()
    assert code == 75 and f"{number.name}: stopping behind step 2" in out
    end = {"outcome": "stopped", "signal": number.name, "step": 2}
    assert status(tmp_path).items() >= end.items()
    assert checkpoints(tmp_path) == ["step_00000002"]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_the_resumed_run_is_bitwise_the_uninterrupted_one(train, send, tmp_path):
    assert train(f"run_dir={tmp_path / 'whole'}")[0] == 0
    send(Engine, "step", signal.SIGTERM, call=2)
    assert [train()[0], train()[0]] == [75, 0]
    for key in ("step", "loss", "grad_norm", "lr", "tokens", "epoch"):
        whole, stopped = (records(tmp_path / name) for name in ("whole", "run"))
        assert [r[key] for r in stopped] == [r[key] for r in whole], key


def test_before_the_first_step_nothing_is_written(train, send, tmp_path):
    send(Trainer, "__init__", signal.SIGUSR1)
    assert train()[0] == 75
    assert (status(tmp_path)["outcome"], status(tmp_path)["step"]) == ("stopped", 0)
    assert checkpoints(tmp_path) == [] and records(tmp_path / "run") == []


def test_without_a_step_since_the_checkpoint_no_other_is_written(train, send, tmp_path):
    assert train("trainer.steps=2")[0] == 0
    times = [p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")]
    send(Trainer, "load", signal.SIGTERM)
    code, out = train()
    assert code == 75 and "nothing to do" not in out
    assert times == [p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").rglob("*")]


def test_an_evaluation_is_left(train, send, tmp_path):
    send(Engine, "evaluate", signal.SIGTERM, call=3)
    more = ["eval.every=2", "data.eval_fraction=0.6", "trainer.micro_batch_size=1"]
    assert train(*more)[0] == 75
    assert [list(r)[-1] for r in records(tmp_path / "run")] == ["epoch", "epoch"]
    assert checkpoints(tmp_path) == ["step_00000002"]
    assert train(*more)[0] == 0
    assert "eval_loss" in records(tmp_path / "run")[-1]


def test_a_save_is_finished_whatever_comes_meanwhile(train, send, tmp_path):
    send(CheckpointFolder, "publish", signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM)
    assert train("checkpoint.background=false")[0] == 75
    assert checkpoints(tmp_path) == ["step_00000003"]
    assert status(tmp_path)["signal"] == "SIGTERM" and status(tmp_path)["step"] == 3


def test_a_save_that_fails_is_no_stop_to_resume_from(train, send, tmp_path, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointFolder, "publish", full)
    send(Engine, "step", signal.SIGTERM)
    code, out = train()
    assert code == 1 and "No space left" in out
    assert status(tmp_path)["outcome"] == "failed" and checkpoints(tmp_path) == []


def test_the_last_step_is_done_and_no_job_of_a_sweep_follows(train, send, tmp_path):
    send(Engine, "step", signal.SIGTERM, call=4)
    jobs = [f"run_dir={tmp_path / 'sweep'}", "optim.lr=1e-3,1e-2"]
    assert train(*jobs, before=("--multirun",))[0] == 75
    (folder,) = (tmp_path / "sweep").iterdir()
    assert json.loads((folder / "status.json").read_text())["outcome"] == "done"


def test_signals_are_noted_only_while_entered():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append("before"))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (signals.noted, received) == ("SIGUSR1", ["before"])
    finally:
        signal.signal(signal.SIGUSR1, before)
