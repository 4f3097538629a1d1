"""The documents of a split as one long text, to build questions and haystacks from."""

import re
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.data.store import TokenStore
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

WORD = re.compile(r"(?<![A-Za-z])[a-z]{4,12}(?![A-Za-z])")
WORDS_FROM = 2**18  # tokens


class Text:
    """Document behind document, without the tokens that start and end them; behind the last comes
    the first.

    documents: indices of the store's, at least one. Raises ConfigError if there is no text.
    """

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, documents: NDArray[np.int64]
    ) -> None:
        self.tokenizer = tokenizer
        self._store, self._documents = store, documents
        self._lengths = store.lengths[documents] - len(tokenizer.start) - 1
        self._ends = np.cumsum(self._lengths)
        if not len(documents) or not self._ends[-1]:
            raise ConfigError(
                "data.eval_fraction: no document is held out, and the tasks are built from those; "
                "allowed: a larger share, or more documents"
            )

    @property
    def tokens(self) -> int:
        """How many there are before they come again."""
        return int(self._ends[-1])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """[count] tokens; start: any number, modulo `tokens`."""
        parts: list[NDArray[np.integer]] = [np.empty(0, np.int64)]
        while count > 0:
            start %= self.tokens
            i = int(np.searchsorted(self._ends, start, side="right"))
            length = int(self._lengths[i])
            first = start - (int(self._ends[i]) - length)
            stop, skipped = min(first + count, length), len(self.tokenizer.start)
            part = self._store.read(int(self._documents[i]), skipped + first, skipped + stop)
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts).astype(np.int64)

    @cached_property
    def words(self) -> list[str]:
        """Lower-case words of 4 to 12 letters near the beginning, each once; at least one."""
        text = self.tokenizer.decode(self.read(0, min(self.tokens, WORDS_FROM)))
        return list(dict.fromkeys(WORD.findall(text))) or ["word"]

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Of all tokens that stand for text, ascending."""
        special = (self.tokenizer.eos_id, self.tokenizer.pad_id)
        every = (i for i in range(self.tokenizer.vocab_size) if i not in special)
        return np.array([i for i in every if self.tokenizer.decode([i])], np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        return self.tokenizer.encode(text).astype(np.int64)
