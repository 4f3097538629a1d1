"""Trains a tokenizer: python scripts/train_tokenizer.py data=stdlib vocab_size=8192 output=DIR."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, train_tokenizer

if __name__ == "__main__":
    command("train_tokenizer", train_tokenizer)
