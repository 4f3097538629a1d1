"""What a measurement is worth nothing without: the machine, the versions, the commit."""

import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from benchmarks.job import ROOT


def facts(device: str, threads: int, command: str) -> dict[str, str | int | None]:
    """For the head of a table and of a file of results."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory_gib(device: str) -> float:
    """What a measurement may take without making the machine swap or kill; where the memory of a
    CUDA device runs out, that measurement alone fails."""
    if device == "cuda":
        return math.inf
    available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
    return int(available.split()[0]) / 2**20


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _commit() -> str | None:
    """With "+" for changes that are not committed; None outside a repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
