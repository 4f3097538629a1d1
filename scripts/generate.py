"""Writes text: python scripts/generate.py checkpoint=DIR prompt="def " tokens=200."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, generate

if __name__ == "__main__":
    command("generate", generate)
