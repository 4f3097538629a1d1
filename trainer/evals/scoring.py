"""The one primitive of evaluation: scores of every token, under any engine and any scheme.

An answer counts as right if each of its tokens is the likeliest one behind the tokens before it,
which is the same as greedy decoding writing it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from parallel.collectives import sum_over_ranks
from parallel.mesh import Mesh
from trainer.batch import IGNORE_INDEX, Batch, Run
from trainer.engine import TokenScores
from trainer.sharder import Sharder


class Scorer:
    """evaluate: of the part of a batch that this rank holds; sharder: where ranks share sequences.

    `before` is called ahead of every batch, on all ranks; what it raises ends the evaluation.
    """

    def __init__(
        self,
        evaluate: Callable[[Batch], TokenScores],
        *,
        mesh: Mesh,
        sharder: Sharder | None = None,
    ) -> None:
        self._evaluate, self._mesh, self._sharder = evaluate, mesh, sharder
        self.before: Callable[[], None] = lambda: None

    def __call__(self, batch: Batch) -> TokenScores:
        """-> scores of the whole batch, loss in fp64, on the host of each rank that shares it."""
        self.before()
        if self._sharder is None or self._mesh.context is None:
            loss, hit = self._evaluate(batch.to(self._mesh.device))
            return TokenScores(loss.double().cpu(), hit.cpu())
        (part,), (layout,) = self._sharder.step([batch])
        scores = self._evaluate(part.to(self._mesh.device))
        index = torch.from_numpy(layout.index(self._sharder.rank)).to(self._mesh.device)
        own = index >= 0
        whole = torch.zeros(2, batch.tokens.numel(), dtype=torch.float64, device=own.device)
        whole[:, index[own]] = torch.stack([x.flatten()[own].double() for x in scores])
        loss, hit = sum_over_ranks(whole, self._mesh.context.group).cpu()
        return TokenScores(loss.view_as(batch.tokens), hit.view_as(batch.tokens) > 0)


def score_runs(
    scorer: Scorer,
    lengths: Sequence[int],
    make: Callable[[int], Run],
    *,
    tokens: int,
    pad_id: int,
    mesh: Mesh,
) -> Iterator[tuple[Sequence[int], Batch, TokenScores]]:
    """Scores runs, a row each, that `make` makes of their numbers; -> numbers, batch and scores of
    those that this data rank was given, in turn.

    lengths: of the runs; rows are as long as the longest beside them. tokens: of a batch, at most,
    or one run.
    """
    groups = group(lengths, tokens)
    for first in range(0, len(groups), mesh.data_ranks):
        mine = groups[first + mesh.data_rank : first + mesh.data_rank + 1]
        numbers = mine[0] if mine else range(0)
        rows = [[make(i)] for i in numbers] or [[]]  # padding meets the other ranks
        longest = max(lengths[i] for i in numbers or groups[first])
        batch = Batch.from_rows(rows, seq_len=longest, pad_id=pad_id)
        scores = scorer(batch)
        if mine:
            yield numbers, batch, scores


def group(lengths: Sequence[int], tokens: int) -> list[range]:
    """Neighbours that fill a rectangle of at most so many tokens, or one alone that does not."""
    groups: list[range] = []
    first = longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > first and longest * (i + 1 - first) > tokens:
            groups.append(range(first, i))
            first, longest = i, length
    return [*groups, range(first, len(lengths))] if lengths else []


# What `outcome` counts.
ANSWERS_RIGHT, ANSWERS, TOKENS_RIGHT, TOKENS, LOSS = range(5)


def outcome(labels: NDArray[np.int64], hit: NDArray[np.bool_], loss: NDArray) -> NDArray:
    """[5] of one row [seq]: right answers, answers, right tokens, tokens, and their loss.

    Labels that follow each other are one answer.
    """
    asked = labels != IGNORE_INDEX
    starts = np.flatnonzero(asked & ~np.concatenate([[False], asked[:-1]]))
    missed = np.add.reduceat(asked & ~hit, starts) if len(starts) else np.empty(0)
    answers_right, right = int((missed == 0).sum()), int((asked & hit).sum())
    return np.array([answers_right, len(starts), right, int(asked.sum()), loss[asked].sum()])
