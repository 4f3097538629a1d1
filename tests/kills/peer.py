"""The third save of a run killed at a random moment, with our store and with Accelerate's.

    python -m tests.kills.peer trials=20 ranks=2

Both under the same torch model (4 M parameters, dropout), optimiser and DistributedDataParallel;
all ranks are killed within the span that a save takes, and the run is started again, as a launcher
would do it. Prints one JSON object: how often the restart failed, from which step it went on where
it did (6 is the save that was hit), and how often the losses were then the same to the bit.
"""

import itertools
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.kills.subjects import SUBJECTS, rank_of_a_run

PATIENCE = 60.0

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.kills.subjects", "accelerate"])


def _start(
    name: str, run_dir: Path, folder: Path, ranks: int, delay: float | None = None
) -> list[int | None]:
    """-> exit codes."""
    folder.mkdir()
    processes = [
        _CONTEXT.Process(target=rank_of_a_run, args=(name, run_dir, folder, rank, ranks, delay))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def measure(name: str, folder: Path, *, trials: int, ranks: int) -> dict[str, int | float]:
    chance = random.Random(0)
    codes = _start(name, folder / "whole", folder / "start", ranks)
    assert not any(codes), (folder / "start" / "errors0").read_text()
    whole = dict(line.split() for line in _losses(folder / "start"))
    span = float((folder / "start" / "span0").read_text())
    seen: Counter[str] = Counter()
    landed = 0
    for trial in itertools.count():
        if landed == trials:
            break
        run_dir = folder / f"run{trial}"
        codes = _start(name, run_dir, folder / f"kill{trial}", ranks, chance.uniform(0, span))
        if -signal.SIGKILL not in codes:
            span /= 2  # measured on a machine that was busy
            continue
        landed += 1
        again = folder / f"again{trial}"
        codes = _start(name, run_dir, again, ranks)
        if any(codes):
            seen["restart failed"] += 1
            continue
        resumed = int((again / "resumed0").read_text())
        seen[f"from step {resumed}"] += 1
        losses = dict(line.split() for line in _losses(again))
        seen["bitwise"] += all(whole[step] == loss for step, loss in losses.items())
        shutil.rmtree(run_dir)
    return {"save_seconds": round(span, 3), **seen}


def _losses(folder: Path) -> list[str]:
    return (folder / "losses0").read_text().splitlines()


def main(arguments: list[str]) -> None:
    options = {"trials": "20", "ranks": "2"} | dict(a.split("=", 1) for a in arguments)
    report: dict[str, object] = dict(options)
    for name in SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            trials, ranks = int(options["trials"]), int(options["ranks"])
            report[name] = measure(name, Path(folder), trials=trials, ranks=ranks)
            print(name, report[name], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
