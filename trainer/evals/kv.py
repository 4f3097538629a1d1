"""Key-value retrieval: lines of keys and numbers, and the question for one of them."""

import numpy as np
from numpy.random import Generator

from trainer.batch import Run
from trainer.data.text import Text
from trainer.evals.synthetic import NumberTask, Tokens, answered


class KeyValueRetrieval(NumberTask):
    """As many lines as fit, in the manner of arXiv 2307.03172; what is left is text before them.
    The depth is that of the line asked for among all.

    Keys are a word of the documents and four digits, none twice.
    """

    name = "kv"

    def question(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        ending = text.encode("\n")
        pairs: list[tuple[Tokens, Tokens]] = []
        names: set[str] = set()
        filled = longest = 0
        while True:
            name = f"{text.words[int(draw.integers(len(text.words)))]}{draw.integers(10_000):04}"
            key, value = text.encode(f"{name}:"), self.number(text, draw)
            longest = max(longest, len(key) + len(value))  # whichever line is asked for has room
            line = len(key) + len(value) + len(ending)
            if filled + line + len(ending) + longest > length:
                break
            if name not in names:
                names.add(name)
                pairs.append((key, value))
                filled += line
        if not pairs:
            raise self.too_short(text, length, 2 * (longest + len(ending)))
        key, value = pairs[round(depth * (len(pairs) - 1))]
        rest = length - filled - len(ending) - len(key) - len(value)
        before = text.read(int(draw.integers(text.tokens)), rest)
        lines = np.concatenate([part for pair in pairs for part in (*pair, ending)])
        return answered(
            [(before, False), (lines, False), (ending, False), (key, False), (value, True)]
        )
