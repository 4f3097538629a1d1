"""Loss by position in a document: what a longer context is worth to the model.

Only windows that are filled by one document count, so that all positions are of the same text.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.batch import Run
from trainer.errors import ConfigError
from trainer.evals.pictures import draw_line
from trainer.evals.task import Bench, Result


class LossByPosition:
    """Mean loss of positions 1, 2-3, 4-7 and so on, named after the first of them.

    length: tokens of a window, null: data.seq_len; windows: how many, spread over the documents,
    null: all. Position p has p tokens of context.
    """

    def __init__(self, *, length: int | None, windows: int | None) -> None:
        for name, value, least in (("length", length, 2), ("windows", windows, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; allowed: {least} or more, or null")
        self.length, self.windows = length, windows

    def names(self, seq_len: int) -> list[str]:
        length = self.length or seq_len
        return [f"loss_{2**i}" for i in range((length - 1).bit_length())]

    def check(self, bench: Bench) -> None:
        self._places(bench)

    def run(self, bench: Bench) -> Result:
        length = self.length or bench.data.seq_len
        places = self._places(bench)
        store, first = bench.corpus.store, bench.data.tokenizer.start

        def window(i: int) -> Run:
            document, start = places[i]
            tokens = store.read(document, start + len(first), start + length)
            return Run(np.append(np.array(first, np.int64), tokens))

        total = np.zeros((2, length))  # loss and count of labels, by position
        for _, _, scores in bench.score_runs([length] * len(places), window):
            total += [scores.loss.sum(0).numpy(), np.full(length, len(scores.loss))]
        loss, count = bench.sum(total)[:, :-1]  # the last one has no label
        names = self.names(bench.data.seq_len)
        edges = 2 ** np.arange(len(names)) - 1  # a label is one position behind its token
        means = np.add.reduceat(loss, edges) / np.add.reduceat(count, edges)

        def draw(path: Path) -> None:
            draw_line(
                path,
                edges + 1,
                means,
                title=f"{len(places)} windows of {length:,} tokens",
                x="tokens of context, from",
                y="nats a token",
            )

        return Result(figures=dict(zip(names, means.tolist(), strict=True)), draw=draw)

    def _places(self, bench: Bench) -> NDArray[np.int64]:
        """[windows, 2]: document and start of each; where there is a start token it stands
        in front of each."""
        length = self.length or bench.data.seq_len
        size = length - len(bench.data.tokenizer.start)
        documents = bench.corpus.documents(bench.split)
        lengths = bench.corpus.store.lengths[documents]
        counts = (lengths - (length - size)) // size
        if not counts.sum():
            raise ConfigError(
                f"tasks.position.length={length}: no document of the split is so long; "
                f"allowed: 2 to {int(lengths.max(initial=0))}"
            )
        owner = np.repeat(documents, counts)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        places = np.stack([owner, (np.arange(len(owner)) - before) * size], axis=1)
        count = min(len(places), self.windows or len(places))
        return places[np.arange(count) * len(places) // count]
