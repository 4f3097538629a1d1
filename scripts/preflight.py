"""Measures ranks and links before a run: torchrun scripts/preflight.py strict=true key=value ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.preflight import preflight
from trainer.main import command

if __name__ == "__main__":
    command("preflight", preflight)
