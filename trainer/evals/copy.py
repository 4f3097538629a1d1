"""Copying: a passage, and the same passage again (arXiv 2402.01032)."""

from collections.abc import Sequence

from numpy.random import Generator

from trainer.batch import Run
from trainer.data.text import Text
from trainer.evals.synthetic import Synthetic, answered, words


class Copying(Synthetic):
    """Words of the documents in random order, which a model cannot write without looking back; the
    passage fills half of the length. All of the second one is the answer."""

    name = "copy"

    def __init__(self, *, lengths: Sequence[int] | None, samples: int, seed: int) -> None:
        super().__init__(lengths=lengths, samples=samples, seed=seed, depths=[0.0])

    def question(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        mark = text.encode("\n")
        size = (length - 2 * len(mark)) // 2
        if size < 1:
            raise self.too_short(text, length, 2 * len(mark) + 2)
        passage = words(text, draw, size)
        before = text.read(int(draw.integers(text.tokens)), length - 2 * size - 2 * len(mark))
        parts = [before, mark, passage, mark]
        return answered([*((part, False) for part in parts), (passage, True)])
