"""A folder belongs to one live run, which leaves its outcome there."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from parallel.mesh import Mesh
from tests.launch import start
from trainer.errors import ConfigError
from trainer.run_folder import hold, session


def test_a_second_run_waits_then_says_who_holds_it(tmp_path):
    other = start({}, tmp_path / "other", "tests.trainer.test_run_folder", str(tmp_path))
    while not (tmp_path / "held").exists():
        assert other.is_alive()
        time.sleep(0.01)
    line = f"run_dir={tmp_path}: held by process {other.pid} on "
    with pytest.raises(ConfigError, match=line), hold(tmp_path, wait=0.3):
        pass
    other.kill()
    with hold(tmp_path, wait=10):  # the kernel frees it, however the process ended
        pass


def main(folder: str) -> None:
    """Holds it for ever."""
    with hold(Path(folder)):
        Path(folder, "held").touch()
        signal.pause()


def test_the_outcome_stands_in_the_folder(tmp_path):
    mesh = Mesh(device=torch.device("cpu"))

    def status():
        return json.loads((tmp_path / "status.json").read_text())

    with session(tmp_path, mesh) as running:
        who = status()
        assert (who.pop("outcome"), who["pid"]) == ("running", os.getpid())
        assert who.keys() == {"host", "pid", "started"}
    assert status() == {"outcome": "done", **who}
    with pytest.raises(RuntimeError), session(tmp_path, mesh):
        raise RuntimeError("step 3: loss nan")
    reason = {"outcome": "failed", "reason": "step 3: loss nan"}
    assert status().items() >= reason.items()
    with session(tmp_path, mesh) as running:
        running.ends(outcome="stopped", signal="SIGTERM", step=7)
    stopped = {"outcome": "stopped", "signal": "SIGTERM", "step": 7}
    assert status().items() >= stopped.items()


def test_a_run_that_ended_without_a_word_is_told(tmp_path):
    mesh = Mesh(device=torch.device("cpu"))
    with session(tmp_path, mesh) as first:
        (tmp_path / "left.json").write_bytes((tmp_path / "status.json").read_bytes())
    with session(tmp_path, mesh) as second:
        pass
    (tmp_path / "left.json").rename(tmp_path / "status.json")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with session(tmp_path, mesh) as third:
        assert (first.left, second.left) == ("", "")
        who = f"process {os.getpid()} on {os.uname().nodename}, behind step 2"
        assert third.left == f"the run before ended without a word: {who}"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), hold(tmp_path / "file" / "run"):
        pass
