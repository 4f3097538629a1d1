"""Trains a model: torchrun scripts/train.py model=kimi_linear key=value ... (--help lists all)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, train

if __name__ == "__main__":
    command("train", train)
