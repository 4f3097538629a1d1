"""Shows where NAtS-L routes a text: see conf/inspect_routing.yaml for the keys."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.main import command, inspect_routing

if __name__ == "__main__":
    command("inspect_routing", inspect_routing)
