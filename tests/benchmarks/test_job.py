"""A measurement's process: what it answers, and what is said when it cannot."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import job
from benchmarks.job import JobFailed
from tests.benchmarks.conftest import JOB, finished


def interpreter(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a shell script in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(job.sys, "executable", str(path))


def test_answers_from_a_process_of_its_own(monkeypatch) -> None:
    monkeypatch.setattr(job, "_finished", finished)
    assert dataclasses.replace(JOB, kind="matmul").run(timeout=100)["flops"] > 1e6


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "failed: killed by SIGKILL, probably out of memory"),
        ("kill -11 $$", "failed: killed by SIGSEGV"),
        ("echo first >&2; echo 'ValueError: no' >&2; exit 1", "failed: ValueError: no"),
        ("exit 3", "failed: without a message"),
        ("exec sleep 30", "stopped: not done after 0.2 s"),
    ],
)
def test_says_why_there_is_no_result(script, reason, tmp_path, monkeypatch) -> None:
    interpreter(tmp_path, script, monkeypatch)
    with pytest.raises(JobFailed) as raised:
        JOB.run(timeout=0.2 if "sleep" in script else 30)
    assert str(raised.value) == reason


def test_reads_the_last_line(tmp_path, monkeypatch) -> None:
    interpreter(tmp_path, 'echo "a warning"; echo \'{"seconds": 2}\'', monkeypatch)
    assert JOB.run(timeout=30) == {"seconds": 2}
