"""Ranks that meet, leave and die: no job of a sweep, and no rank, waits for one that is gone."""

import os
import time

import pytest
import torch

from parallel import mesh as meshes
from parallel.collectives import LostRankError, sum_over_ranks
from parallel.mesh import join, joined, membership
from tests.launch import forked

WORDS = {"op": "softmax", "direction": "forward"}


@pytest.mark.parametrize("message", ["sum", "shift", "exchange"])
def test_a_rank_that_dies_ends_the_others(message):
    alive, dead = forked(2, "tests.parallel.test_mesh", message)
    assert (alive.returncode, dead.returncode) == (3, 9), alive.stderr
    assert alive.stdout.startswith("another rank ended, or did not answer in time: ")
    assert alive.stdout.count("\n") == 1


def test_the_next_job_goes_on_where_all_failed_and_not_where_one_did():
    for rank, done in enumerate(forked(2, "tests.parallel.test_mesh", "jobs")):
        ends = ["cp and ulysses are, by rank, [(1, 1), (2, 1)]; allowed: the same on every rank"]
        ends += ["all failed, joined: False", "done, joined: False"]
        ends += [["lost, joined: True"], ["alone failed, joined: True"]][rank]
        assert done.stdout.splitlines() == ends, done.stderr


def die(message: str) -> None:
    mesh = join(timeout_minutes=1, cp=2)
    axis, x = mesh.context, torch.zeros(2, 1)
    assert axis is not None
    send = {
        "sum": lambda: sum_over_ranks(x, mesh.group),
        "shift": lambda: axis.shift(x, 2, **WORDS).wait(),
        "exchange": lambda: axis.exchange(x, [1, 1], [1, 1], **WORDS).wait(),
    }[message]
    send()
    if mesh.rank == 1:
        os._exit(9)
    try:
        send()
    except LostRankError as error:
        print(error, flush=True)
        os._exit(3)


def jobs() -> None:
    meshes.FAILURE_SECONDS = 1.0
    try:
        join(timeout_minutes=1, cp=1 + int(os.environ["RANK"]))
    except ValueError as error:
        print(error, flush=True)
    if os.environ["RANK"] == "0":  # it serves the store: the other is back in it by then
        time.sleep(0.5)
    for failing in ("all", "none", "alone"):
        end = "done"
        mesh = join(timeout_minutes=1, cp=2)
        try:
            with membership(mesh):
                if failing == "all" or (failing == "alone" and mesh.rank == 1):
                    raise ValueError(f"{failing} failed")
                sum_over_ranks(torch.zeros(1), mesh.group)
        except ValueError as error:
            end = str(error)
        except LostRankError:
            end = "lost"
        print(f"{end}, joined: {joined()}", flush=True)


def main(message: str) -> None:
    jobs() if message == "jobs" else die(message)
