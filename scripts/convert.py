"""Converts weights: python scripts/convert.py source=DIR target=DIR format=hf|native, or
recipe=transmla and the like, see conf/recipe."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, convert

if __name__ == "__main__":
    command("convert", convert)
