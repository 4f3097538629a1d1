"""Training rows made by an evaluation task: its examples, with labels on the answers only."""

import hashlib
import json
from typing import Any, Protocol, runtime_checkable

from numpy.random import Generator

from trainer.batch import Run
from trainer.data.corpus import Corpus
from trainer.data.rows import Rows
from trainer.data.text import Text
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

ROWS = 2**20  # of an epoch; every epoch has rows of its own

TRAINING = 1  # the first stream; evaluation takes another, see trainer.evals.synthetic


@runtime_checkable
class ExampleTask(Protocol):
    """What is needed of a task, e.g. `trainer.evals.synthetic.Synthetic`."""

    name: str

    def sizes(self, seq_len: int) -> list[int]: ...

    def draw(self, *stream: int) -> Generator: ...

    def example(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run: ...


class TaskCorpus(Corpus):
    """Documents whose text a task makes training rows of; the held-out ones are for evaluation."""

    def __init__(self, *, task: ExampleTask, tokenizer: Tokenizer, **keywords: Any) -> None:
        """The other keywords are those of `Corpus`."""
        super().__init__(**keywords)
        self._task, self._tokenizer = task, tokenizer

    def rows(self, seq_len: int) -> Rows:
        text = Text(self.store, self._tokenizer, self.documents("train"))
        return TaskRows(self._task, text, seq_len=seq_len, seed=self.seed, identity=self.identity())

    def identity(self) -> dict[str, str | int | float]:
        name = self._task.name
        options = {f"tasks.{name}.{key}": str(x) for key, x in vars(self._task).items()}
        return {**super().identity(), f"{self.key}.task": name, **options}


class TaskRows(Rows):
    """Rows of seq_len tokens, a pure function of (seed, epoch, row).

    A row takes examples of lengths drawn from those of the task, at depths drawn evenly, until none
    fits any more. Raises ConfigError if not even one does.
    """

    def __init__(
        self,
        task: ExampleTask,
        text: Text,
        *,
        seq_len: int,
        seed: int,
        identity: dict[str, str | int | float],
    ) -> None:
        """identity: what text and task follow from, compared on resume."""
        self.seq_len = seq_len
        self._task, self._text, self._seed, self._identity = task, text, seed, identity
        self._sizes = [size for size in task.sizes(seq_len) if size <= seq_len]
        if not self._sizes:
            raise ConfigError(
                f"tasks.{task.name}.lengths={task.sizes(seq_len)}: none fits into rows of "
                f"data.seq_len={seq_len} tokens; allowed: one at least that does"
            )
        self.read(0, 0)  # refuses lengths that hold no example

    def count(self, epoch: int) -> int:
        return ROWS

    def read(self, epoch: int, row: int) -> list[Run]:
        draw = self._task.draw(TRAINING, self._seed, epoch, row)
        runs: list[Run] = []
        room = self.seq_len
        while fitting := [size for size in self._sizes if size <= room]:
            length = fitting[int(draw.integers(len(fitting)))]
            runs.append(self._task.example(self._text, draw, length=length, depth=draw.random()))
            room -= length
        return runs

    def hash(self, epoch: int) -> str:
        """Of the identity, and of the first row: random numbers are numpy's."""
        digest = hashlib.sha256(json.dumps([self._identity, self._seed, epoch]).encode())
        for run in self.read(epoch, 0):
            digest.update(run.tokens.tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, str | int | float]:
        return self._identity
