"""Which jobs are requeued: by the outcome of the run, and by what the attempts achieved."""

import json
import os
import subprocess
import sys
from itertools import count

import pytest
import torch.distributed as dist

from parallel.collectives import LostRankError, reaching_ranks
from tests.launch import ROOT
from trainer.slurm import attempts

LIMITS = {"max_requeues": 10, "max_stalls": 2}


@pytest.fixture
def attempt(tmp_path):
    """One attempt of job 7 at tmp_path; -> the decision at its end."""
    times = count(1)

    def attempt(outcome: str | None, step: int = 0, **limits) -> attempts.Decision:
        attempts.begin(tmp_path, "7")
        if outcome is not None:
            kind, _, reason = outcome.partition(": ")
            status = tmp_path / "status.json"
            status.write_text(json.dumps({"outcome": kind, "reason": reason}))
            os.utime(status, (next(times),) * 2)
        if step:
            (tmp_path / "checkpoints" / f"step_{step:08}").mkdir(parents=True, exist_ok=True)
        return attempts.end(tmp_path, "7", **(LIMITS | limits))

    return attempt


@pytest.mark.parametrize(
    ("outcome", "requeue", "why"),
    [
        ("stopped", True, "stopped, to be resumed"),
        ("running", True, "died"),
        ("failed: another rank ended, or did not answer", True, "failed: another rank ended, "),
        ("failed: step 3: loss nan", False, "failed: step 3: loss nan"),
        ("done", False, "done"),
        (None, True, "ended before the run began"),
    ],
)
def test_the_outcome_decides(attempt, outcome, requeue, why):
    decision = attempt(outcome, step=5)
    assert decision.requeue is requeue and decision.why.startswith(why)


def test_a_lost_rank_is_known_by_its_reason():
    with pytest.raises(LostRankError) as lost, reaching_ranks():
        raise dist.DistBackendError("connection closed")
    assert str(lost.value).startswith(attempts.ACCIDENTS)


def test_the_status_of_the_attempt_before_does_not_count(attempt):
    attempt("done", step=5)
    assert attempt(None).why == "ended before the run began"


def test_a_torn_status_is_none(attempt, tmp_path):
    attempts.begin(tmp_path, "7")
    (tmp_path / "status.json").write_text('{"outcome": "sto')
    assert attempts.decide(tmp_path, "7", **LIMITS) == attempts.Decision(True, "left no status")


def test_attempts_without_a_new_checkpoint_come_to_an_end(attempt):
    assert attempt("stopped", step=10).requeue
    assert attempt("running").requeue
    assert attempt("stopped", step=10).requeue
    assert attempt("running") == attempts.Decision(
        False, "died; no new checkpoint in 3 attempts in a row"
    )


def test_progress_counts_from_the_best_before(attempt):
    """A run that goes back and forth between the same steps gets nowhere."""
    assert attempt("stopped", step=10).requeue
    assert attempt("stopped", step=20).requeue
    assert all(attempt("stopped").requeue for _ in range(2))
    assert attempt("stopped", step=30).requeue


def test_attempts_that_slurm_killed_count_too(attempt, tmp_path):
    for _ in range(2):
        attempts.begin(tmp_path, "7")
    assert not attempt("running").requeue


def test_no_more_than_max_requeues(attempt):
    assert attempt("stopped", step=1, max_requeues=2).requeue
    assert attempt("stopped", step=2, max_requeues=2).requeue
    assert attempt("stopped", step=3, max_requeues=2) == attempts.Decision(
        False, "stopped, to be resumed; max_requeues=2 is reached"
    )


def test_another_job_at_the_same_run_starts_afresh(attempt, tmp_path):
    for _ in range(3):
        attempt("running")
    assert attempts.begin(tmp_path, "8") == "attempt 1 of job 8, from step 0"
    assert attempts.decide(tmp_path, "8", **LIMITS).requeue


def test_the_pointer_says_which_checkpoint_is_the_newest(tmp_path):
    assert attempts.newest_step(tmp_path) == 0
    folder = tmp_path / "checkpoints"
    for name in ("step_00000010", "step_00000020", ".step_00000030"):
        (folder / name).mkdir(parents=True)
    assert attempts.newest_step(tmp_path) == 20
    (folder / "latest").write_text("step_00000010\n")
    assert attempts.newest_step(tmp_path) == 10


def test_the_batch_shell_needs_the_standard_library_only():
    """`-S` leaves site-packages out."""
    code = "import sys; sys.path.insert(0, '.'); import trainer.slurm.attempts"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)
