"""A needle in a haystack: one sentence with a number inside long text, asked for at its end."""

from numpy.random import Generator

from trainer.batch import Run
from trainer.data.text import Text
from trainer.evals.synthetic import NumberTask, answered


class NeedleInAHaystack(NumberTask):
    """The haystack is consecutive text of documents. A needle at depth 0 stands before it all, at
    depth 1 right before the question."""

    name = "niah"

    def question(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        key = text.words[int(draw.integers(len(text.words)))]
        statement = text.encode(f"The magic number of {key} is")
        answer = self.number(text, draw)
        opening, ending = text.encode("\n"), text.encode(".\n")
        question = text.encode(f"\nWhat is the magic number of {key}?\n")
        around = len(opening) + 2 * len(statement) + 2 * len(answer) + len(ending) + len(question)
        room = length - around
        if room < 0:
            raise self.too_short(text, length, around)
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
