"""One measurement in a fresh process, so that its peak of memory is its own."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.load import wait_until_quiet
from benchmarks.settings import Dtype, Malloc

ROOT = Path(__file__).resolve().parent.parent
Config = Mapping[str, Any]
Result = dict[str, Any]


class JobFailed(Exception):
    """The measurement gave no result; one line says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure; travels to the process as JSON."""

    kind: Literal["train", "transformers", "mixer", "matmul"]
    dtype: Dtype
    device: str
    threads: int
    malloc: Malloc
    seed: int = 0
    repeats: int = 1
    length: int = 0
    config: Config | None = None  # sections of train.yaml
    weights: str | None = None  # a Hugging Face folder; None: initial values by the seed
    profile: bool = False
    patience: float = 0.0  # seconds to wait for a quiet machine

    def run(self, timeout: float) -> Result:
        """Raises JobFailed if the process fails, is killed, or takes over `timeout` seconds."""
        wait_until_quiet(self.patience)
        command = [sys.executable, "-m", "benchmarks.worker"]
        sent = json.dumps(asdict(self))
        try:
            done = subprocess.run(
                command, input=sent, capture_output=True, text=True, cwd=ROOT, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise JobFailed(f"stopped: not done after {timeout:g} s") from None
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            memory = ", probably out of memory" if name == "SIGKILL" else ""
            raise JobFailed(f"failed: killed by {name}{memory}")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["without a message"]
            raise JobFailed(f"failed: {lines[-1]}")
        return json.loads(done.stdout.splitlines()[-1])
