"""Trains with faults at chosen places, run on ranks or under a launcher: -m this FOLDER JOBS.

JOBS is the text of a JSON list, each entry of which has the `overrides` of a job and its `faults`.
A fault is [rank, class, method, call, what]: what befalls the rank when it calls the method for
the `call`th time. How each job ended goes to FOLDER/<job>.<rank>: its exit code.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from parallel import mesh as meshes
from tests.models.build import compose
from trainer import main as commands
from trainer.checkpoint.store import CheckpointStore
from trainer.data import TrainStream
from trainer.engine import Engine
from trainer.engine.ddp import DDPEngine
from trainer.loop import Trainer
from trainer.loss import LanguageModelLoss
from trainer.signals import end_with_launcher

OWNERS = [CheckpointStore, DDPEngine, Engine, LanguageModelLoss, TrainStream, Trainer]


def befall(what: str, folder: Path, rank: int) -> None:
    """A signal by its name, except: `sleep` for ever; `die` once another rank sleeps."""
    if what == "sleep":
        (folder / "asleep").write_text(str(os.getpid()))
        time.sleep(600)
    if what == "die":
        while not (folder / "asleep").exists():
            time.sleep(0.01)
        (folder / "died").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.Signals[what])


@contextlib.contextmanager
def inject(faults: list, folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        for rank, owner, method, call, what in faults:
            if rank == int(os.environ["RANK"]):
                kind = next(kind for kind in OWNERS if kind.__name__ == owner)
                work = faulty(getattr(kind, method), call, what, folder, rank)
                patches.enter_context(mock.patch.object(kind, method, work))
        yield


def faulty(work: Callable, call: int, what: str, folder: Path, rank: int) -> Callable:
    calls = []

    def faulty(*args, **kwargs):
        calls.append(what)
        if len(calls) == call and what != "nan":
            befall(what, folder, rank)
        result = work(*args, **kwargs)
        return result * math.nan if len(calls) == call and what == "nan" else result

    return faulty


def main(where: str, jobs: str) -> None:
    end_with_launcher()
    meshes.FAILURE_SECONDS = 1.0
    folder = Path(where)
    for i, job in enumerate(json.loads(jobs)):
        code = 0
        with inject(job["faults"], folder):
            try:
                with commands.exit_codes("train"):
                    commands.train(compose(job["overrides"]))
            except SystemExit as stop:
                code = stop.code
        (folder / f"{i}.{os.environ['RANK']}").write_text(str(code))
        if code not in (0, commands.EXIT_STOPPED):
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
