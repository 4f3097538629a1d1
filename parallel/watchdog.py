"""Ends a run, with a line that says why, where a rank is lost or stands still.

A thread of every rank takes part in a small all-reduce, the heartbeat, whatever the main thread
computes or waits for. It breaks within moments when a process ends, and after a bound when the
network falls silent; the ranks that are left then call the roll in the store, and those that do not
answer are named. The heartbeat also carries how far each rank has come: one that stands still for
too long is found by its own thread, and every rank writes down where it stands.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BEAT_SECONDS = 0.25
POLL_SECONDS = 0.1
ROLL_CALL_SECONDS = 0.7  # from the first rank that misses another to the last
GRACE_SECONDS = 0.4  # for a main thread that noticed too to end the process itself
WRITE_SECONDS = 10.0  # storage may be what hangs
WARM_UP = 10.0  # so much longer may the first step take, with all that is built and compiled for it
NAMED = 8  # ranks in a line

_LEAVING, _OVERDUE, _BEATS, _STEP = range(4)  # columns of the heartbeat, a row per rank


class _RollCalledError(RuntimeError):
    """Another rank has noticed first."""


class Watchdog:
    """Of one rank; alone, where there is no store, it only sees its own main thread stand still.

    hosts: by rank; lost_seconds: the longest silence; hang_seconds: the longest time between two
    calls of `beat`, None for any; folder: where stacks go. `last_words` gets the reason before the
    process ends with code 1. Making one with a store is collective.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        hosts: Sequence[str] = ("",),
        store: Any = None,
        lost_seconds: float = 60.0,
        hang_seconds: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.rank, self.hosts = rank, hosts
        self.lost_seconds, self.hang_seconds, self.folder = lost_seconds, hang_seconds, folder
        self.last_words: Callable[[str], None] = lambda reason: None
        # A Store and a ProcessGroupGloo, of which torch's stubs lack what is called here.
        self._store: Any = None
        self._group: Any = None
        if store is not None:
            # A connection of its own: the main thread may be waiting on the other.
            self._store = dist.PrefixStore("watchdog", store.clone())
            timeout = timedelta(seconds=lost_seconds)
            self._group = dist.ProcessGroupGloo(self._store, rank, len(hosts), timeout)
        self._beats, self._step, self._warm = 0, 0, False
        self._beaten = time.monotonic()
        self._leaving, self._ended = threading.Event(), threading.Event()
        self._reason = ""
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """The main thread goes on, behind `step` steps."""
        self._warm = self._warm or (self._beats > 0 and step != self._step)
        self._beats, self._step = self._beats + 1, step
        self._beaten = time.monotonic()

    def tell(self, cause: str) -> None:
        """Leaves word of what may end this process, for those that will miss it."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone too
                self._store.append("causes", json.dumps([self.rank, cause]) + "\n")

    def reason(self, seen: str) -> str:
        """Why a message of another rank cannot come: `seen`, if nobody is missed."""
        self._ended.wait(BEAT_SECONDS + 2 * ROLL_CALL_SECONDS)
        return self._reason or seen

    def leave(self) -> None:
        """Returns when every rank has called it; nobody is missed from then on."""
        self._leaving.set()
        self._thread.join()

    def close(self) -> None:
        """Gives the connections up; behind `leave`, and a message of all ranks behind that."""
        self._group = self._store = None

    def _watch(self) -> None:
        reason = None
        while reason is None:
            start, wait = time.monotonic(), 0.0
            try:
                table = self._exchange()
            except _RollCalledError:
                wait = BEAT_SECONDS  # the others have waited since
            except RuntimeError:
                wait = ROLL_CALL_SECONDS
            if wait:  # behind the exception, which holds on to the connections
                _within(POLL_SECONDS, self._hang_up)
                silent = time.monotonic() - start > self.lost_seconds / 2
                reason = self._missing(silent, wait)
                continue
            if table[:, _LEAVING].all():
                return
            if table[:, _OVERDUE].any():
                _within(WRITE_SECONDS, self._write_down)
                reason = self._standstill(table)
            self._leaving.wait(BEAT_SECONDS)
        self._end(reason)

    def _exchange(self) -> Tensor:
        """[ranks, columns], of all ranks."""
        table = torch.zeros(len(self.hosts), 4, dtype=torch.int64)
        table[self.rank, _LEAVING] = self._leaving.is_set()
        table[self.rank, _OVERDUE] = self._overdue()
        table[self.rank, _BEATS], table[self.rank, _STEP] = self._beats, self._step
        if self._group is not None:
            self._await(self._group.allreduce([table]))
        return table

    def _await(self, work: dist.Work) -> None:
        """Raises RuntimeError where the message cannot come, _RollCalledError where another knows.

        In a large group only neighbours notice at once, the others are told through the store. Of
        that it is not expected to answer: it may be what was lost.
        """
        start, listening = time.monotonic(), True
        while not work.is_completed():
            late = time.monotonic() - start > BEAT_SECONDS
            time.sleep(BEAT_SECONDS if late else POLL_SECONDS)
            if late and listening:
                called = _within(ROLL_CALL_SECONDS, lambda: self._store.check(["alive"]))
                listening = called is not None
                if called:
                    raise _RollCalledError
        work.wait()

    def _hang_up(self) -> None:
        """Closes the connections, by which the others notice; may wait for a message under way."""
        self._group = None

    def _overdue(self) -> bool:
        if self.hang_seconds is None or self._leaving.is_set():
            return False
        bound = self.hang_seconds * (1 if self._warm else WARM_UP)
        return time.monotonic() - self._beaten > bound

    def _missing(self, silent: bool, wait: float) -> str:
        how = f"silent for {self.lost_seconds:g} s" if silent else "its process ended"
        heard = _within(3 * ROLL_CALL_SECONDS, lambda: self._call_roll(wait))
        if heard is None:
            return f"lost other ranks, {how}; nor can the store be reached that all met in"
        alive, causes = heard
        lost = [rank for rank in range(len(self.hosts)) if rank not in alive]
        if not lost:
            return f"lost the connection to other ranks, of which none is missing ({how})"
        told = [f"; rank {rank}: {cause}" for rank, cause in causes if rank in lost]
        return f"lost {self._names(lost)}: {how}{''.join(told[:NAMED])}"

    def _call_roll(self, wait: float) -> tuple[set[int], list[tuple[int, str]]]:
        """-> the ranks that answer within `wait` seconds, and what any rank told."""
        self._store.append("alive", f"{self.rank} ")
        time.sleep(wait)
        alive = set(map(int, self._store.get("alive").split()))
        causes = self._store.get("causes") if self._store.check(["causes"]) else b""
        return alive, [tuple(json.loads(line)) for line in causes.splitlines()]

    def _standstill(self, table: Tensor) -> str:
        beats = table[:, _BEATS].tolist()
        last = [rank for rank, count in enumerate(beats) if count == min(beats)]
        where = f"no rank is ahead of another, {len(beats)} in all"
        if len(last) < len(beats):
            where = f"the others wait for {self._names(last)}"
        seconds = time.monotonic() - self._beaten
        stacks = f"; stacks in {self.folder}/hang_rank*.txt" if self.folder else ""
        return (
            f"no progress for {seconds:.0f} s behind step {min(table[:, _STEP])}: {where}{stacks}"
        )

    def _names(self, ranks: list[int]) -> str:
        named = [f"rank {rank} on {self.hosts[rank]}" for rank in ranks[:NAMED]]
        more = [f"{len(ranks) - NAMED} more"] if len(ranks) > NAMED else []
        return ", ".join(named + more)

    def _write_down(self) -> None:
        """The stack of every thread, and the last messages of this rank where torch keeps them."""
        if self.folder is None:
            return
        with (self.folder / f"hang_rank{self.rank:05}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # A CUDA build has both, each with what its own backends sent.
        name = "_dump_nccl_trace" if torch.cuda.is_available() else "_dump_fr_trace"
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None and self._group is not None:
            (self.folder / f"hang_trace_{self.rank}").write_bytes(dump())

    def _end(self, reason: str) -> None:
        self._reason = reason
        self._ended.set()
        time.sleep(GRACE_SECONDS)
        line = f"error: rank {self.rank}: {reason}"
        _within(WRITE_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
        _within(WRITE_SECONDS, lambda: self.last_words(reason))
        os._exit(1)


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """What `action` returns; None if it fails, or is not done in time."""
    done: list[T] = []

    def attempt() -> None:
        with contextlib.suppress(Exception):
            done.append(action())

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return done[0] if done else None
