"""Ranks that die, stand still, fall silent or end at other times than the rest, without a launcher.

Every case is a process per rank; all cases run at once.
"""

import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest

from parallel import mesh as meshes
from parallel import watchdog as watchdogs
from parallel.mesh import Mesh, join, membership
from parallel.watchdog import Watchdog
from tests.launch import FORKSERVER, free_port

RANKS = 3
HOST = os.uname().nodename


def ends_late(mesh: Mesh, watchdog: Watchdog) -> None:
    watchdog.beat(0)
    time.sleep(mesh.rank)


def is_killed(mesh: Mesh, watchdog: Watchdog) -> None:
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def fails_alone(mesh: Mesh, watchdog: Watchdog) -> None:
    if mesh.rank == 1:
        raise ValueError("disk on fire\nin line two")
    time.sleep(60)


def stands_still(mesh: Mesh, watchdog: Watchdog) -> None:
    watchdog.beat(6)
    watchdog.beat(7)
    if mesh.rank != 1:
        watchdog.beat(7)
    time.sleep(60)


def falls_silent(mesh: Mesh, watchdog: Watchdog) -> None:
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


BOUNDS = {
    "ends_late": {},
    "is_killed": {},
    "fails_alone": {},
    "stands_still": {"hang_seconds": 1.0},
    "falls_silent": {"lost_seconds": 2.0},
}


def run(case: str, rank: int, folder: Path, port: int) -> None:
    sys.stderr = (folder / f"{rank}.txt").open("w", buffering=1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), **place}
    meshes.FAILURE_SECONDS = 0.5
    watchdogs.GRACE_SECONDS = 3.0  # the first rank holds the store, of which others may ask late
    for _ in range(2 if case == "ends_late" else 1):
        mesh = join(timeout_minutes=1)
        try:
            with membership(mesh, folder=folder, **BOUNDS[case]) as watchdog:
                globals()[case](mesh, watchdog)
        except ValueError:
            os._exit(2)
    os._exit(0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Case -> its folder and the exit codes of its ranks."""
    folders = {case: tmp_path_factory.mktemp(case) for case in BOUNDS}
    started = {}
    for case, folder in folders.items():
        started[case] = [
            FORKSERVER.Process(target=run, args=(case, rank, folder, port))
            for port in [free_port()]
            for rank in range(RANKS)
        ]
        for process in started[case]:
            process.start()
    for processes in started.values():
        for process in processes[::2]:
            process.join(30)
        processes[1].join(0 if processes is started["falls_silent"] else 30)
        for process in processes:
            process.kill()
    codes = {case: [p.exitcode for p in processes] for case, processes in started.items()}
    return {case: (folder, codes[case]) for case, folder in folders.items()}


def line(folder: Path, rank: int) -> str:
    told = (folder / f"{rank}.txt").read_text().splitlines()
    assert len(told) == 1, told
    return told[0]


def test_nobody_is_missed_at_the_end(ended):
    """In two jobs one after the other."""
    folder, codes = ended["ends_late"]
    assert codes == [0, 0, 0]
    assert [(folder / f"{rank}.txt").read_text() for rank in range(RANKS)] == ["", "", ""]


@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("is_killed", "its process ended"),
        ("fails_alone", "its process ended; rank 1: ValueError: disk on fire"),
        ("falls_silent", "silent for 2 s"),
    ],
)
def test_a_lost_rank_is_named_by_the_others(ended, case, how):
    folder, codes = ended[case]
    assert (codes[0], codes[2]) == (1, 1)
    for rank in (0, 2):
        assert line(folder, rank) == f"error: rank {rank}: lost rank 1 on {HOST}: {how}"


def test_a_rank_that_stands_still_is_named_and_all_stacks_are_written(ended):
    folder, codes = ended["stands_still"]
    assert codes == [1, 1, 1]
    for rank in range(RANKS):
        where = f"behind step 7: the others wait for rank 1 on {HOST}; stacks in {folder}/hang_rank"
        assert line(folder, rank).startswith(f"error: rank {rank}: no progress for ")
        assert where in line(folder, rank)
        assert "in stands_still" in (folder / f"hang_rank{rank:05}.txt").read_text()
        trace = pickle.loads((folder / f"hang_trace_{rank}").read_bytes())
        assert "all_gather" in " ".join(entry["profiling_name"] for entry in trace["entries"])


def test_alone_only_standing_still_ends_the_process(tmp_path):
    process = FORKSERVER.Process(target=alone, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert (tmp_path / "reason").read_text().startswith("no progress for ")
    assert "in alone" in (tmp_path / "hang_rank00000.txt").read_text()


def alone(folder: Path) -> None:
    with membership(Mesh(device="cpu"), folder=folder, hang_seconds=0.05) as watchdog:
        watchdog.beat(0)
        time.sleep(0.2)  # less than ten times as long: the first step
    with membership(Mesh(device="cpu"), folder=folder, hang_seconds=0.3) as watchdog:
        watchdog.last_words = (folder / "reason").write_text
        watchdog.beat(0)
        watchdog.beat(1)
        time.sleep(60)
