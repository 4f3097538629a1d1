"""What an evaluation task is given and what it gives back."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.collectives import sum_over_ranks
from parallel.mesh import Mesh
from trainer.batch import Batch, Run
from trainer.data import Data, StreamedData
from trainer.data.corpus import Corpus, Split
from trainer.data.text import Text
from trainer.engine import TokenScores
from trainer.evals.scoring import LOSS, Scorer, outcome, score_runs

Figures = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """figures: by name, None where there is nothing to tell; cells: those of a grid, one by one;
    draw: leaves a picture at a path."""

    figures: Figures
    cells: list[Figures] = field(default_factory=list)
    draw: Callable[[Path], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model to be scored, and documents.

    source: of a mixture, whose documents a task makes its questions of. split: which documents;
    batches: how many micro-batches of whole ones, of all sources, a rank scores, None: all.
    write: yields new tokens [1] behind a prompt [1, seq], where this rank alone can; see
    `trainer.generation.generate`.
    """

    scorer: Scorer
    mesh: Mesh
    data: Data | StreamedData
    micro_batch_size: int
    source: str = ""
    split: Split = "eval"
    batches: int | None = None
    write: Callable[..., Iterator[Tensor]] | None = None

    @property
    def corpus(self) -> Corpus:
        """The source's; `build_tasks` has seen to it that there is a token store."""
        assert isinstance(self.data, Data)
        return self.data.corpora[self.source]

    @cached_property
    def text(self) -> Text:
        corpus = self.corpus
        return Text(corpus.store, self.data.tokenizer, corpus.documents(self.split))

    def score_documents(self) -> Iterator[tuple[Batch, TokenScores]]:
        """Rows of documents, those of this data rank."""
        batches: Iterable[Batch] = self.data.eval_batches(
            micro_batch_size=self.micro_batch_size,
            rank=self.mesh.data_rank,
            ranks=self.mesh.data_ranks,
            split=self.split,
        )
        for batch in islice(batches, self.batches):
            yield batch, self.scorer(batch)

    def score_runs(
        self, lengths: Sequence[int], make: Callable[[int], Run]
    ) -> Iterator[tuple[Sequence[int], Batch, TokenScores]]:
        """As `scoring.score_runs`, in batches as large as micro-batches of documents."""
        return score_runs(
            self.scorer,
            lengths,
            make,
            tokens=self.micro_batch_size * self.data.seq_len,
            pad_id=self.data.tokenizer.pad_id,
            mesh=self.mesh,
        )

    def outcomes(self, lengths: Sequence[int], make: Callable[[int], Run]) -> NDArray[np.float64]:
        """[runs, 5]: the `scoring.outcome` of every run, over all ranks."""
        found = np.zeros((len(lengths), LOSS + 1))
        for numbers, batch, (loss, hit) in self.score_runs(lengths, make):
            rows = zip(batch.labels.numpy(), hit.numpy(), loss.numpy(), strict=True)
            found[list(numbers)] = [outcome(*row) for row in rows]
        return self.sum(found)

    def sum(self, own: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over data ranks; ranks that share sequences have the same, which counts once."""
        mesh = self.mesh
        counts = mesh.context is None or mesh.context.rank == 0
        return sum_over_ranks(torch.from_numpy(own * counts), mesh.group).numpy()


class Task(Protocol):
    """Made of the section `tasks.<name>`."""

    def names(self, seq_len: int) -> list[str]:
        """Of its figures, where rows have seq_len tokens."""
        ...

    def check(self, bench: Bench) -> None:
        """Raises ConfigError, without the model, if `run` could not be done."""
        ...

    def run(self, bench: Bench) -> Result:
        """Collective; the same on every rank. Raises ConfigError."""
        ...


def finite(figures: Figures) -> Figures:
    """None for what JSON has no name for."""
    return {k: x if x is not None and math.isfinite(x) else None for k, x in figures.items()}
