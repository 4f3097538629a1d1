"""Does training jobs one after the other on the ranks of one launch: torchrun -m this JOBS.

JOBS is a JSON list with the overrides of each job. One that starts with `rank 1: ` is for that rank
only; a ConfigError ends the job and goes to standard error, from every rank.
"""

import json
import os
import sys
from pathlib import Path

from tests.models.build import compose
from trainer.errors import ConfigError
from trainer.main import train


def own(override: str) -> list[str]:
    mine = f"rank {os.environ['RANK']}: "
    if override.startswith("rank "):
        return [override.removeprefix(mine)] if override.startswith(mine) else []
    return [override]


def main(jobs: str) -> None:
    for overrides in json.loads(Path(jobs).read_text()):
        try:
            train(compose([kept for override in overrides for kept in own(override)]))
        except ConfigError as error:
            print(f"refused by rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # the threads of a process group can abort a process that Python winds up
