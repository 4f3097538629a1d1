"""Starts ranks with torchrun, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(ranks: int, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    """`torchrun arguments` in the repository. Judge it by what it wrote rather than by its exit
    code: a finished process may rarely abort while it exits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={ranks}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
