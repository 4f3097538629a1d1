"""Submits a run to Slurm: python scripts/slurm/submit.py nodes=2 model=kimi_linear key=value ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from trainer.main import command, submit

if __name__ == "__main__":
    command("slurm", submit)
