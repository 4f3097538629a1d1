"""Runs of training jobs side by side, below one folder: in this process or on ranks."""

import json
from pathlib import Path

import pytest
import torch

from parallel.mesh import Mesh
from tests.launch import fork
from tests.models.build import compose
from tests.trainer.shared_on_ranks import watch
from tests.trainer.tiny import overrides
from trainer.build import build_trainer

SINGLE = Mesh(device=torch.device("cpu"))


class Runs:
    """common: overrides of every run."""

    def __init__(self, path: Path, common: list[str]) -> None:
        """Writes documents from a few tokens to several rows, lengths off any grid."""
        self.path, self.common = path, common
        (path / "texts").mkdir()
        for i, length in enumerate((700, 333, 160, 159, 97, 41, 40, 23, 7, 3, 161, 55)):
            text = "".join(chr(97 + (j * (i + 3)) % 26) for j in range(length))
            (path / "texts" / f"{i}.txt").write_text(text)

    def words(self, name: str, *more: str) -> list[str]:
        """Of the command line."""
        made = [o for o in overrides(self.path) if not o.startswith(("data.path", "run_dir"))]
        place = [f"data.path={self.path / 'texts'}", f"run_dir={self.path / name}"]
        return [*made, *place, *self.common, *more]

    def alone(self, name: str, *more: str) -> dict:
        """In this process; -> what `watch` saw, and keeps it as a rank does."""
        (self.path / name).mkdir()
        config = compose(self.words(name, *more))
        trainer = build_trainer(config, mesh=SINGLE, run_dir=self.path / name)
        seen = watch(trainer)
        trainer.run()
        torch.save(seen, self.path / name / "seen_0.pt")
        return seen

    def on_ranks(self, ranks: int, jobs: dict[str, list[str]], seconds: float = 280) -> str:
        """All jobs in one launch; -> what they printed.

        Among a job's overrides, NAME=VALUE in capitals is for its environment, `rank N: KEY=VALUE`
        for that rank alone, and a word a mark, see `shared_on_ranks`.
        """
        made = [self._job(name, words) for name, words in jobs.items()]
        (self.path / "jobs.json").write_text(json.dumps(made))
        file = str(self.path / "jobs.json")
        return fork(ranks, "tests.trainer.shared_on_ranks", file, seconds=seconds)

    def _job(self, name: str, words: list[str]) -> dict:
        environment = [word for word in words if word.partition("=")[0].isupper()]
        marks = [word for word in words if "=" not in word]
        own = [word.partition(": ") for word in words if word.startswith("rank ")]
        others = {*environment, *marks, *map("".join, own)}
        changes = [word for word in words if word not in others]
        return {
            "config": compose(self.words(name, *changes)),
            "environment": dict(word.split("=") for word in environment),
            "marks": marks,
            **{rank: compose(self.words(name, *changes, change)) for rank, _, change in own},
        }

    def records(self, name: str) -> list[dict]:
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def seen(self, name: str, rank: int) -> dict:
        return torch.load(self.path / name / f"seen_{rank}.pt")

    def resume(self, name: str, step: int) -> str:
        return f"resume={self.path / name / 'checkpoints' / f'step_{step:08}'}"


def assert_same(run: list[dict], other: list[dict], tolerance: float) -> None:
    for got, expected in zip(run, other, strict=True):
        assert got["step"] == expected["step"] and got["tokens"] == expected["tokens"]
        for key in {"loss", "grad_norm", "eval_loss"} & expected.keys():
            assert got[key] == pytest.approx(expected[key], rel=tolerance, abs=0), key


def assert_same_gradients(got: dict, expected: dict, tolerance: float) -> None:
    """Largest difference relative to the largest entry of a parameter's gradient."""
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        error = (got[name].float() - grad.float()).abs().max()
        assert error <= tolerance * grad.abs().max(), name
