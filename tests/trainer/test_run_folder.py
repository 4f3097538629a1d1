"""A folder belongs to one live run, which leaves its outcome there."""

import errno
import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from parallel import mesh as meshes
from parallel.mesh import Mesh
from tests.launch import forked, start
from trainer import main as commands
from trainer import run_folder
from trainer.errors import ConfigError
from trainer.run_folder import hold, session

MODULE = "tests.trainer.test_run_folder"


def test_a_second_run_waits_then_says_who_holds_it(tmp_path):
    other = start({}, tmp_path / "other", MODULE, "hold_for_ever", str(tmp_path))
    while not (tmp_path / "held").exists():
        assert other.is_alive()
        time.sleep(0.01)
    line = f"run_dir={tmp_path}: held by process {other.pid} on "
    with pytest.raises(ConfigError, match=line), hold(tmp_path, wait=0.3):
        pass
    other.kill()
    with hold(tmp_path, wait=10):  # the kernel frees it, however the process ended
        pass


def main(task: str, folder: str) -> None:
    {"hold_for_ever": hold_for_ever, "begin_apart": begin_apart}[task](Path(folder))


def hold_for_ever(folder: Path) -> None:
    with hold(folder):
        (folder / "held").touch()
        signal.pause()


def begin_apart(folder: Path) -> None:
    """A session in a folder that all ranks share, and one that each rank has by itself."""
    own = folder / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)
    run_folder.SIGHT_SECONDS = 0.3
    with commands.exit_codes("train"), meshes.membership(mesh := meshes.join()):
        with session(Path("..", "shared"), mesh):
            pass
        with session(Path("run"), mesh):
            pass


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path):
    ranks = forked(2, MODULE, "begin_apart", str(tmp_path))
    host, place = os.uname().nodename, tmp_path / "1" / "run"
    line = f"run_dir=run: what rank 0 writes is not seen by rank 1 on {host}, in {place}; allowed"
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert ranks[0].stderr.startswith(f"error: {line}: ") and ranks[0].stderr.count("\n") == 1
    assert json.loads((tmp_path / "0" / "run" / "status.json").read_text())["outcome"] == "failed"
    assert json.loads((tmp_path / "shared" / "status.json").read_text())["outcome"] == "done"
    left = {path.name for path in tmp_path.glob("*/*") if path.is_file()}
    left |= {path.name for path in (tmp_path / "0" / "run").iterdir()}
    assert left == {".lock", "status.json"}
    assert not any((tmp_path / "1").iterdir())


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_warning_is_all(tmp_path, monkeypatch, caplog, number):
    reason = os.strerror(number)

    def refuse(*args):
        raise OSError(number, reason)

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path, wait=0), hold(tmp_path, wait=0):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    why = f"cannot be locked ({reason}): two runs in it would overwrite each other"
    assert caplog.messages == [f"run_dir={tmp_path} {why}"] * 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), hold(tmp_path / "file" / "run"):
        pass
