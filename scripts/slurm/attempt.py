"""Notes an attempt of a Slurm job; `end` exits with 0 if the job is to be requeued, else with 3."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from trainer.slurm import attempts

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("event", choices=("begin", "end"))
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--max-requeues", type=int, default=100)
    parser.add_argument("--max-stalls", type=int, default=2)
    given = parser.parse_args()
    if given.event == "begin":
        print(attempts.begin(given.run_dir, given.job))
        sys.exit(0)
    limits = {"max_requeues": given.max_requeues, "max_stalls": given.max_stalls}
    decision = attempts.end(given.run_dir, given.job, **limits)
    print(f"{'requeue' if decision.requeue else 'no requeue'}: {decision.why}")
    sys.exit(0 if decision.requeue else 3)
