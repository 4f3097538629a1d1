"""Questions whose answers stand earlier in the sequence, made from the text of documents.

In the manner of RULER (arXiv 2404.06654). Labels are on the answers only. An example is a pure
function of the task's seed, a stream and its number, so that evaluation and training, which are
different streams, repeat exactly.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from trainer.batch import IGNORE_INDEX, Run
from trainer.data.text import Text
from trainer.errors import ConfigError
from trainer.evals.pictures import draw_heat_map, draw_line
from trainer.evals.scoring import ANSWERS, ANSWERS_RIGHT, LOSS, TOKENS, TOKENS_RIGHT
from trainer.evals.task import Bench, Figures, Result

EVALUATION = 0  # the first stream; training takes those behind it

Tokens = NDArray[np.int64]


class Synthetic(ABC):
    """The base of such tasks; `name` is that of their section, `tasks.<name>`.

    lengths: of the examples in tokens, null: a quarter, half and all of data.seq_len. depths:
    where the answer stands, from 0, the beginning, to 1, the end. samples: examples for each of
    both. Raises ValueError.
    """

    name: ClassVar[str]

    def __init__(
        self, *, lengths: Sequence[int] | None, samples: int, seed: int, depths: Sequence[float]
    ) -> None:
        if lengths is not None and not (lengths and min(lengths) > 0):
            raise ValueError(f"lengths is {lengths}; allowed: one or more, each above 0, or null")
        if not depths or min(depths) < 0 or max(depths) > 1:
            raise ValueError(f"depths is {depths}; allowed: one or more, each from 0 to 1")
        for key, value, least in (("samples", samples, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{key} is {value}; allowed: {least} or more")
        self.lengths, self.depths = lengths, list(depths)
        self.samples, self.seed = samples, seed

    def example(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        """Exactly `length` tokens with their labels. Raises ConfigError if they are too few."""
        start = np.array(text.tokenizer.start, np.int64)
        run = self.question(text, draw, length=length - len(start), depth=depth)
        unlabelled = np.full(len(start), IGNORE_INDEX)
        return Run(
            np.concatenate([start, run.tokens]),
            labels=np.concatenate([unlabelled, run.all_labels()]),
        )

    @abstractmethod
    def question(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        """An example behind what the tokenizer puts before any text."""

    def sizes(self, seq_len: int) -> list[int]:
        """Lengths in tokens, ascending, each once."""
        return sorted(set(self.lengths or [max(seq_len // 4, 1), max(seq_len // 2, 1), seq_len]))

    def names(self, seq_len: int) -> list[str]:
        sizes = self.sizes(seq_len)
        return ["accuracy", "token_accuracy", "loss", *(f"accuracy_{size}" for size in sizes)]

    def check(self, bench: Bench) -> None:
        """By making all examples of the shortest length."""
        shortest = self.sizes(bench.data.seq_len)[0]
        for i in range(len(self.depths) * self.samples):
            self.example(bench.text, self.draw(EVALUATION, i), length=shortest, depth=1.0)

    def run(self, bench: Bench) -> Result:
        """accuracy: share of answers that are right; token_accuracy: of their tokens; loss: nats a
        token of them."""
        sizes = self.sizes(bench.data.seq_len)
        grid = [*product(sizes, self.depths)]
        places = [place for place in grid for _ in range(self.samples)]

        def make(i: int) -> Run:
            length, depth = places[i]
            return self.example(bench.text, self.draw(EVALUATION, i), length=length, depth=depth)

        found = bench.outcomes([length for length, _ in places], make)
        cells = found.reshape(len(sizes), len(self.depths), self.samples, -1).sum(2)
        shares = cells[..., ANSWERS_RIGHT] / cells[..., ANSWERS]  # [lengths, depths]
        told: list[Figures] = [
            {"length": length, "depth": depth, "accuracy": share}
            for (length, depth), share in zip(grid, shares.flatten().tolist(), strict=True)
        ]
        figures = self._figures(cells, bench.data.seq_len)
        told = told if len(self.depths) > 1 else []  # by length alone they are among the figures
        return Result(figures=figures, cells=told, draw=partial(self._draw, sizes, shares))

    def _figures(self, cells: NDArray[np.float64], seq_len: int) -> Figures:
        by_length = cells.sum(1)
        whole = by_length.sum(0)
        values = [
            whole[ANSWERS_RIGHT] / whole[ANSWERS],
            whole[TOKENS_RIGHT] / whole[TOKENS],
            whole[LOSS] / whole[TOKENS],
            *(by_length[:, ANSWERS_RIGHT] / by_length[:, ANSWERS]),
        ]
        return dict(zip(self.names(seq_len), map(float, values), strict=True))

    def _draw(self, sizes: list[int], shares: NDArray[np.float64], path: Path) -> None:
        title = f"{self.name}: share of right answers"
        if len(self.depths) > 1:
            draw_heat_map(path, shares.T, columns=sizes, rows=self.depths, title=title)
        else:
            axes = {"x": "tokens", "y": "accuracy"}
            draw_line(path, np.array(sizes), shares[:, 0], title=title, limits=(0, 1.05), **axes)

    def draw(self, *stream: int) -> Generator:
        """Of one example."""
        return np.random.Generator(np.random.PCG64((self.seed, *stream)))

    def too_short(self, text: Text, length: int, needed: int) -> ConfigError:
        """length, needed: of a question."""
        start = len(text.tokenizer.start)
        length, needed = length + start, needed + start
        return ConfigError(
            f"tasks.{self.name}.lengths: {length} tokens hold no example; allowed: {needed} or more"
        )


class NumberTask(Synthetic):
    """The answer is a number with so many digits."""

    def __init__(
        self,
        *,
        lengths: Sequence[int] | None,
        samples: int,
        seed: int,
        depths: Sequence[float],
        digits: int,
    ) -> None:
        super().__init__(lengths=lengths, samples=samples, seed=seed, depths=depths)
        if digits < 1:
            raise ValueError(f"digits is {digits}; allowed: 1 or more")
        self.digits = digits

    def number(self, text: Text, draw: Generator) -> Tokens:
        """A random one behind a blank."""
        return text.encode(" " + "".join(map(str, draw.integers(10, size=self.digits))))


def answered(parts: Sequence[tuple[Tokens, bool]]) -> Run:
    """The parts one behind the other; labels on those marked as an answer."""
    tokens = np.concatenate([part for part, _ in parts])
    asked = np.concatenate([np.full(len(part), answer) for part, answer in parts])
    labels = np.full(len(tokens), IGNORE_INDEX, np.int64)
    labels[:-1][asked[1:]] = tokens[1:][asked[1:]]
    return Run(tokens, labels=labels)


def words(text: Text, draw: Generator, count: int) -> Tokens:
    """[count] tokens of words in random order, which nothing before them foretells."""
    parts: list[Tokens] = []
    while count > 0:
        word = text.words[int(draw.integers(len(text.words)))]
        parts.append(text.encode(f" {word}")[:count])
        count -= len(parts[-1])
    return np.concatenate([np.empty(0, np.int64), *parts])
