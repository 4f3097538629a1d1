"""The folder of a run: one live run at a time holds it, and its outcome is left there."""

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from parallel.collectives import LostRankError, barrier
from parallel.mesh import Mesh
from parallel.watchdog import Watchdog
from trainer.checkpoint.ranks import Ranks
from trainer.errors import ConfigError
from trainer.locks import NoLocksError, try_lock

log = logging.getLogger(__name__)

LOCK_SECONDS = 30.0  # time for the run before a restart to end
SIGHT_SECONDS = 10.0  # network file systems show late what another machine wrote
_TAIL = 8192  # bytes that hold a line of metrics.jsonl


@contextlib.contextmanager
def hold(run_dir: Path, *, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds the lock of the folder, which the kernel drops with the process, however it ends.

    Raises ConfigError, saying who holds it, if another run still does after `wait` seconds. Where
    the file system has no locks, a warning is all.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            _await_lock(lock, run_dir, wait)
        except NoLocksError as error:
            log.warning(
                "run_dir=%s cannot be locked (%s): two runs in it would overwrite each other",
                run_dir,
                error,
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield


def _await_lock(lock: IO[str], run_dir: Path, wait: float) -> None:
    deadline = time.monotonic() + wait
    while not try_lock(lock):
        if time.monotonic() > deadline:
            lock.seek(0)
            holder = lock.read().strip() or "another run"
            raise ConfigError(f"run_dir={run_dir}: held by {holder}; allowed: a free folder")
        time.sleep(0.2)


class Status:
    """status.json: what a scheduler reads when the exit code got lost, and who is at work.

    It holds outcome (running, done, stopped or failed), host, pid and started, and what else is
    known in the end: the reason, or the signal, and the step. Nothing is written without a folder.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self.left = "" if run_dir is None else _left_running(run_dir)
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._facts = {"host": os.uname().nodename, "pid": os.getpid(), "started": started}
        self._end: dict[str, object] = {"outcome": "done"}
        self._write({"outcome": "running"})

    def ends(self, **facts: object) -> None:
        """What is to stand there once the session has ended without an error."""
        self._end |= facts

    def finish(self) -> None:
        self._write(self._end)

    def fail(self, reason: str) -> None:
        self._write({"outcome": "failed", "reason": reason})

    def _write(self, end: dict[str, object]) -> None:
        if self.run_dir is not None:
            write_whole(self.run_dir / "status.json", json.dumps(end | self._facts) + "\n")


@contextlib.contextmanager
def session(run_dir: Path, mesh: Mesh, watchdog: Watchdog | None = None) -> Iterator[Status]:
    """The main process holds the folder and leaves the outcome there; the others wait for it.

    The watchdog leaves there what it ends the run for.
    """
    with hold(run_dir) if mesh.main else contextlib.nullcontext():
        barrier(mesh.group)
        status = Status(run_dir if mesh.main else None)
        if watchdog is not None:
            watchdog.last_words = status.fail
        try:
            check_shared(run_dir, Ranks(mesh.group))
            yield status
        except BaseException as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, LostRankError) and watchdog is not None:
                reason = watchdog.reason(reason)
            status.fail(reason)
            raise
        status.finish()


def check_shared(run_dir: Path, ranks: Ranks) -> None:
    """Raises ConfigError, on every rank, unless all see what rank 0 writes to the folder.

    Others would write their part of each checkpoint to a folder of their own.
    """
    if ranks.count == 1:
        return
    token = ranks.first(lambda: secrets.token_hex(8))
    file = run_dir / f".shared_{token}"
    ranks.first(lambda: file.write_text(token))
    try:
        ranks.together(lambda: _await_token(file, token, ranks.rank))
    finally:
        if ranks.rank == 0:
            file.unlink()


def _await_token(file: Path, token: str, rank: int) -> None:
    deadline = time.monotonic() + SIGHT_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == token:
                return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir={file.parent}: what rank 0 writes is not seen by rank {rank} on "
                f"{os.uname().nodename}, in {file.parent.absolute()}; allowed: a folder that all "
                "nodes share"
            )
        time.sleep(0.2)


def _left_running(run_dir: Path) -> str:
    """A line on the run before this one if it never wrote its end; empty if it did.

    Who holds the folder knows that it is over.
    """
    try:
        before = json.loads((run_dir / "status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return ""
    if before["outcome"] != "running":
        return ""
    process = f"process {before.get('pid')} on {before.get('host')}"
    return f"the run before ended without a word: {process}, behind step {_last_step(run_dir)}"


def _last_step(run_dir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 without one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, _TAIL), os.SEEK_END)
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def write_whole(path: Path, text: str) -> None:
    """Replaces a file so that no reader ever sees half of it."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(text)
    staged.replace(path)
