"""torchrun that gives its workers time to save when it is told to stop; takes its arguments."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.launch import launch

if __name__ == "__main__":
    launch(sys.argv[1:])
