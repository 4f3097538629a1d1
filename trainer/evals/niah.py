"""A needle in a haystack: one sentence with a number inside long text, asked for at its end."""

from collections.abc import Sequence

from numpy.random import Generator

from trainer.batch import Run
from trainer.data.text import Text
from trainer.evals.synthetic import Synthetic, answered, number


class NeedleInAHaystack(Synthetic):
    """The haystack is consecutive text of documents. A needle at depth 0 stands before it all, at
    depth 1 right before the question."""

    name = "niah"

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

    def example(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        key = text.words[int(draw.integers(len(text.words)))]
        statement = text.encode(f"The magic number of {key} is")
        answer = number(text, draw, self.digits)
        opening, ending = text.encode("\n"), text.encode(".\n")
        question = text.encode(f"\nWhat is the magic number of {key}?\n")
        around = len(opening) + 2 * len(statement) + 2 * len(answer) + len(ending) + len(question)
        room = length - around
        if room < 0:
            raise self.too_short(length, around)
        hay = text.read(int(draw.integers(text.tokens)), room)
        place = round(depth * room)
        return answered(
            [
                (hay[:place], False),
                *((part, False) for part in (opening, statement, answer, ending)),
                (hay[place:], False),
                *((part, False) for part in (question, statement)),
                (answer, True),
            ]
        )
