"""Chooses which layers of a hybrid get which mixer: see conf/select_layers.yaml for the keys."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, select_layers

if __name__ == "__main__":
    command("select_layers", select_layers)
