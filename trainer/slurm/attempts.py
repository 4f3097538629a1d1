"""The attempts of a Slurm job at its run, and whether another one is worth it.

A batch script calls this, on the first node and outside of any container: standard library only.
Each attempt leaves lines in run_dir/attempts.jsonl, the first as it begins.
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "attempts.jsonl"
# How the reasons begin with which a run fails through no fault of its own: ranks that were lost,
# or stood still.
ACCIDENTS = ("another rank ended", "lost ", "no progress for ")
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Decision:
    requeue: bool
    why: str


def begin(run_dir: Path, job: str) -> str:
    """Notes that an attempt starts, and from what; -> one line for the log."""
    step = newest_step(run_dir)
    number = 1 + len(_begun(run_dir, job))
    line = {"event": "begin", "status": _status_time(run_dir), "step": step}
    _append(run_dir, job, line)
    return f"attempt {number} of job {job}, from step {step}"


def end(run_dir: Path, job: str, *, max_requeues: int, max_stalls: int) -> Decision:
    """Notes how the attempt ended, and decides."""
    decision = decide(run_dir, job, max_requeues=max_requeues, max_stalls=max_stalls)
    line = {"event": "end", "requeue": decision.requeue, "why": decision.why}
    _append(run_dir, job, line | {"step": newest_step(run_dir)})
    return decision


def decide(run_dir: Path, job: str, *, max_requeues: int, max_stalls: int) -> Decision:
    """Whether the job is to run again, by status.json and by what its attempts achieved.

    A run that was stopped, died, never came up or met with an accident goes on; one that is done
    or failed by itself does not. Neither does one behind `max_requeues` requeues, nor one of which
    more than `max_stalls` attempts in a row left no checkpoint beyond those before.
    """
    goes_on, why = _outcome(run_dir, job)
    if not goes_on:
        return Decision(False, why)
    begun = _begun(run_dir, job)
    if len(begun) > max_requeues:
        return Decision(False, f"{why}; max_requeues={max_requeues} is reached")
    stalls = _stalls([line["step"] for line in begun] + [newest_step(run_dir)])
    if stalls > max_stalls:
        return Decision(False, f"{why}; no new checkpoint in {stalls} attempts in a row")
    return Decision(True, why)


def newest_step(run_dir: Path) -> int:
    """Of the newest published checkpoint; 0 where there is none."""
    folder = run_dir / "checkpoints"
    pointer = folder / "latest"
    names = [pointer.read_text().strip()] if pointer.is_file() else []
    names = names or [path.name for path in folder.glob("step_*")]
    return max([0, *(int(match[1]) for match in map(_STEP.fullmatch, names) if match)])


def _outcome(run_dir: Path, job: str) -> tuple[bool, str]:
    """Whether the run wants to go on, and what became of the attempt."""
    begun = _begun(run_dir, job)
    if not begun or _status_time(run_dir) == begun[-1]["status"]:
        return True, "ended before the run began"
    try:
        status = json.loads((run_dir / "status.json").read_text())
        outcome, reason = status["outcome"], status.get("reason", "")
    except (OSError, ValueError, KeyError, TypeError):
        return True, "left no status"
    if outcome == "failed":
        return reason.startswith(ACCIDENTS), f"failed: {reason}"
    if outcome == "done":
        return False, "done"
    return True, "stopped, to be resumed" if outcome == "stopped" else "died"


def _stalls(steps: list[int]) -> int:
    """How many of the last attempts in a row ended at no step beyond all before.

    steps: the newest at the beginning of each attempt, and now.
    """
    stalls = 0
    for before in range(len(steps) - 1, 0, -1):
        if steps[before] > max(steps[:before]):
            break
        stalls += 1
    return stalls


def _status_time(run_dir: Path) -> int | None:
    """When status.json was written; None without one."""
    path = run_dir / "status.json"
    return path.stat().st_mtime_ns if path.exists() else None


def _begun(run_dir: Path, job: str) -> list[dict[str, Any]]:
    """What this job's attempts noted as they began, oldest first."""
    path = run_dir / FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["job"] == job and line["event"] == "begin"]


def _append(run_dir: Path, job: str, facts: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    line = {"job": job, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | facts
    with (run_dir / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
