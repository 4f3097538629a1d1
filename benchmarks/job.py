"""One measurement in fresh processes, one a rank, so that its peak of memory is its own."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.load import wait_until_quiet
from benchmarks.settings import Malloc
from trainer.settings import Precision

ROOT = Path(__file__).resolve().parent.parent
Config = Mapping[str, Any]
Result = dict[str, Any]
GRACE = 30.0  # seconds in which torchrun ends its ranks


class JobFailed(Exception):
    """The measurement gave no result; one line says why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure; travels to the process as JSON."""

    kind: Literal["train", "transformers", "mixer", "attention", "checkpoint", "saved", "matmul"]
    dtype: Precision
    device: str
    threads: int  # of each rank
    malloc: Malloc
    seed: int = 0
    repeats: int = 1
    length: int = 0
    config: Config | None = None  # sections of train.yaml
    weights: str | None = None  # a Hugging Face folder; None: initial values by the seed
    profile: bool = False
    ranks: int = 1
    case: Config | None = None  # of suite=attention and suite=activations: theirs
    patience: float = 0.0  # seconds to wait for a quiet machine

    def run(self, timeout: float) -> Result:
        """Raises JobFailed if the process fails, is killed, or takes over `timeout` seconds."""
        wait_until_quiet(self.patience)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "job.json")
            path.write_text(json.dumps(asdict(self)))
            code, printed, errors = _finished([*self._launcher(), str(path)], timeout)
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", probably out of memory" if name == "SIGKILL" else ""
            raise JobFailed(f"failed: killed by {name}{memory}")
        if code:
            raise JobFailed(f"failed: {_reason(errors)}")
        return json.loads(printed.splitlines()[-1])

    def _launcher(self) -> list[str]:
        ranks = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "-m"]
        several = ranks if self.ranks > 1 else []
        return [sys.executable, "-m", *several, "benchmarks.worker"]


def _finished(command: list[str], timeout: float) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which a kill would leave behind
            try:
                process.communicate(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise JobFailed(f"stopped: not done after {timeout:g} s") from None
        return process.returncode, printed, errors


def _reason(errors: str) -> str:
    """The exception of a rank, before what torchrun has to say about it; else the last line."""
    lines = errors.strip().splitlines() or ["without a message"]
    raised = (
        re.match(r"(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception|Refused): .*)", x) for x in lines
    )
    return next((match[1] for match in raised if match), lines[-1])
