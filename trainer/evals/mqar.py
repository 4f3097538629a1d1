"""Multi-query associative recall, arXiv 2312.04927: pairs of tokens, then the first of each again.

After k1 v1 k2 v2 ... each key comes once more, followed by its value, which is the answer. Gaps
between pairs and questions are drawn from a power law; between questions stand tokens that are
values, so that no key is ever seen before another token than its own value.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from trainer.batch import IGNORE_INDEX, Run
from trainer.data.text import Text
from trainer.errors import ConfigError
from trainer.evals.synthetic import Synthetic, Tokens


class MultiQueryRecall(Synthetic):
    """pairs: in an example, null: as many as an eighth of its length; vocabulary: how many tokens
    take part, half of them keys; power: of the gaps, 1 for even ones."""

    name = "mqar"

    def __init__(
        self,
        *,
        lengths: Sequence[int] | None,
        samples: int,
        seed: int,
        pairs: int | None,
        vocabulary: int,
        power: float,
    ) -> None:
        super().__init__(lengths=lengths, samples=samples, seed=seed, depths=[0.0])
        if vocabulary < 4:
            raise ValueError(f"vocabulary is {vocabulary}; allowed: 4 or more")
        if pairs is not None and not 0 < pairs <= vocabulary // 2:
            raise ValueError(
                f"pairs is {pairs}; allowed: 1 to {vocabulary // 2}, half the vocabulary, or null"
            )
        if power <= 0:
            raise ValueError(f"power is {power}; allowed: above 0")
        self.pairs, self.vocabulary, self.power = pairs, vocabulary, power

    def question(self, text: Text, draw: Generator, *, length: int, depth: float) -> Run:
        count = self.pairs or max(1, min(length // 8, self.vocabulary // 2))
        if length < 4 * count:
            raise self.too_short(text, length, 4 * count)
        keys, values = self._ids(text)
        asked = draw.choice(keys, count, replace=False)
        given = draw.choice(values, count)
        tokens = draw.choice(values, length)
        labels = np.full(length, IGNORE_INDEX, np.int64)
        tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2] = asked, given
        slots = np.arange((length - 2 * count) // 2)  # of two tokens each
        weights = (slots + 1.0) ** (self.power - 1)
        chosen = draw.choice(slots, count, replace=False, p=weights / weights.sum())
        places = 2 * count + 2 * chosen
        tokens[places], tokens[places + 1] = asked, given
        labels[places] = given
        return Run(tokens, labels=labels)

    def _ids(self, text: Text) -> tuple[Tokens, Tokens]:
        """Keys and values, spread over all tokens that stand for text."""
        ids = text.ids
        if len(ids) < self.vocabulary:
            raise ConfigError(
                f"tasks.mqar.vocabulary={self.vocabulary}: the tokenizer has {len(ids)} tokens of "
                "text; allowed: as many or fewer"
            )
        chosen = ids[np.arange(self.vocabulary) * len(ids) // self.vocabulary]
        half = self.vocabulary // 2
        return chosen[:half], chosen[half:]
