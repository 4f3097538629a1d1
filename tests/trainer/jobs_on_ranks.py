"""Does training jobs one after the other on the ranks of one launch: torchrun -m this JOBS.

JOBS is a JSON list with the overrides of each job.
"""

import json
import os
import sys
from pathlib import Path

from tests.models.build import compose
from trainer.main import train

if __name__ == "__main__":
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        train(compose(overrides))
    os._exit(0)  # the threads of a process group can abort a process that Python winds up
