"""The folder of a run: one live run at a time holds it, and its outcome is left there."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from parallel.collectives import barrier
from parallel.mesh import Mesh
from trainer.errors import ConfigError

LOCK_SECONDS = 30.0  # time for the run before a restart to end


@contextlib.contextmanager
def hold(run_dir: Path, *, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds the lock of the folder, which the kernel drops with the process, however it ends.

    Raises ConfigError, saying who holds it, if another run still does after `wait` seconds.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be written ({error.strerror})") from error
    with lock:
        deadline = time.monotonic() + wait
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                lock.seek(0)
                holder = lock.read().strip() or "another run"
                raise ConfigError(f"run_dir={run_dir}: held by {holder}; allowed: a free folder")
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield


@contextlib.contextmanager
def session(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """The main process holds the folder and leaves the outcome there; the others wait for it."""
    if not mesh.main:
        barrier(mesh.group)
        yield
        return
    with hold(run_dir):
        barrier(mesh.group)
        write_status(run_dir, "running")
        try:
            yield
        except BaseException as error:
            write_status(run_dir, "failed", reason=str(error) or type(error).__name__)
            raise
        write_status(run_dir, "done")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_status(run_dir: Path, outcome: str, **facts: object) -> None:
    """status.json, replaced in one piece: what a scheduler reads when the exit code got lost."""
    write_whole(run_dir / "status.json", json.dumps({"outcome": outcome, **facts}) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replaces a file so that no reader ever sees half of it."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text)
    staged.replace(path)
