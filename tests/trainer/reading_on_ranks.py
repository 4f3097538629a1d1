"""Trains jobs one after the other, on the ranks of one launch or alone, and keeps what was read.

Run on ranks: JOBS is a JSON list of (name, resolved configuration). A job leaves in its run_dir
<name>_<rank>.json: the place of the rank, its first step, the rows of all micro-batches by step.
"""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from trainer.batch import Batch
from trainer.engine import Engine
from trainer.loop import Trainer
from trainer.main import train


def run(name: str, config: dict[str, Any]) -> None:
    first, data_rank = [], []
    steps: list[list[str]] = []

    def train_step(trainer, take=Trainer.train_step):
        first.append(trainer.step + 1)
        data_rank.append(trainer.mesh.data_rank)
        steps.append([])
        return take(trainer)

    def accumulate(engine, batch, scale, *, last, take=Engine.accumulate):
        if isinstance(batch, Batch):  # not the probe of the factor
            steps[-1] += batch.source.partition(":")[0].split(", ")
        return take(engine, batch, scale, last=last)

    with (
        mock.patch.object(Trainer, "train_step", train_step),
        mock.patch.object(Engine, "accumulate", accumulate),
    ):
        train(config)
    read = {"data_rank": data_rank[0], "first": first[0], "steps": steps}
    file = f"{name}_{os.environ.get('RANK', 0)}.json"
    Path(config["run_dir"], file).write_text(json.dumps(read))


def main(jobs: str) -> None:
    for name, config in json.loads(Path(jobs).read_text()):
        run(name, config)
