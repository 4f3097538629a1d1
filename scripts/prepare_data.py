"""Prepares a token store: python scripts/prepare_data.py data=jsonl data.path=PATH output=DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, prepare_data

if __name__ == "__main__":
    command("prepare_data", prepare_data)
