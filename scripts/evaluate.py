"""Evaluates a model: python scripts/evaluate.py checkpoint=DIR task=perplexity data=files ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, evaluate

if __name__ == "__main__":
    command("evaluate", evaluate)
