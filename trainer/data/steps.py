"""What each optimiser step reads: a pure function of the data cursor, the steps read before it.

Stages follow each other; in a stage the rows of the sources come in a fixed pattern. The n-th row
of a source at one sequence length is the same whatever was read between, so that nothing but the
cursor has to be known to go on. A source goes on at a length where the last stage of that length
left it; a new length starts a pass of its own over the documents.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.agreement import flatten
from trainer.data.rows import Rows

LONGEST_PATTERN = 10_000  # rows after which a pattern repeats itself, at most


@dataclass(frozen=True, kw_only=True)
class RopeSetting:
    """Of all rotary layers in a stage; null: as the mixer's own keys say."""

    base: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; allowed: above 0, or null")

    def __str__(self) -> str:
        told = [f"rope {name} {value:g}" for name, value in asdict(self).items() if value]
        return ", ".join(told) or "rope of the mixers"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """weights: share of the rows by source; steps None: without end."""

    seq_len: int
    batch_size: int
    weights: Mapping[str, float]
    steps: int | None = None
    rope: RopeSetting = RopeSetting()

    def facts(self) -> dict[str, Any]:
        """What its steps follow from beside the sources; JSON."""
        return {
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "weights": {name: self.share(name) for name in self.sources()},
            "rope": asdict(self.rope),
        }

    def share(self, source: str) -> float:
        """Of its rows."""
        return self.weights[source] / sum(self.weights.values())

    def sources(self) -> list[str]:
        """That it reads from."""
        return sorted(name for name, weight in self.weights.items() if weight)


class RowId(NamedTuple):
    source: str
    epoch: int
    row: int


class Pattern:
    """An order in which positions 0, 1, 2 ... are dealt to sources, each share as even as can be.

    Shares are exact where a period of at most LONGEST_PATTERN allows it, else to 1 in that many.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = np.array(_counts(weights))  # [sources], in one period
        self.period = int(self.counts.sum())
        self._owner, self._rank = interleave(self.counts)

    def at(self, position: int) -> tuple[int, int]:
        """(source, how many positions before this one are of the same source)."""
        periods, place = divmod(position, self.period)
        source = int(self._owner[place])
        return source, periods * int(self.counts[source]) + int(self._rank[place])

    def before(self, position: int) -> NDArray[np.int64]:
        """[sources]: positions of each before this one."""
        periods, place = divmod(position, self.period)
        part = np.bincount(self._owner[:place], minlength=len(self.counts))
        return periods * self.counts + part


def interleave(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(owner, rank) of counts[i] things of each owner i, every beginning in proportion."""
    owner = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((owner, (rank + 0.5) / counts[owner]))
    return owner[order], rank[order]


def _counts(weights: Sequence[float]) -> list[int]:
    total = math.fsum(weights)
    shares = [Fraction(w / total).limit_denominator(LONGEST_PATTERN) for w in weights]
    period = math.lcm(*(share.denominator for share in shares))
    exact = sum(shares) == 1 and period <= LONGEST_PATTERN
    if exact and all(share or not w for share, w in zip(shares, weights, strict=True)):
        return [int(share * period) for share in shares]
    wanted = [w / total * LONGEST_PATTERN for w in weights]
    counts = [max(math.floor(x), int(x > 0)) for x in wanted]
    by_rest = sorted(range(len(wanted)), key=lambda i: counts[i] - wanted[i])
    for i in by_rest[: max(0, LONGEST_PATTERN - sum(counts))]:
        counts[i] += 1
    return counts


class Steps:
    """The rows of every step of the stages; rows: of a source at a sequence length."""

    def __init__(self, stages: Sequence[Stage], rows: Callable[[str, int], Rows]) -> None:
        self.stages, self._rows = list(stages), rows
        lasting = [stage.steps or 0 for stage in self.stages[:-1]]
        self.first = list(accumulate(lasting, initial=0))  # steps before each stage
        self.sources = sorted({name for stage in stages for name in stage.sources()})
        self._patterns = [
            Pattern([stage.weights.get(name, 0.0) for name in self.sources]) for stage in stages
        ]
        self._read_before = [self._taken(i) for i in range(len(self.stages))]
        self._ends: dict[tuple[str, int], list[int]] = {}  # rows up to the end of each epoch

    def stage(self, cursor: int) -> Stage:
        return self.stages[self.index(cursor)]

    def rows(self, cursor: int) -> list[RowId]:
        """batch_size rows of the stage."""
        i = self.index(cursor)
        stage, pattern = self.stages[i], self._patterns[i]
        first = (cursor - self.first[i]) * stage.batch_size
        dealt = [pattern.at(first + j) for j in range(stage.batch_size)]
        return [
            self._place(i, source, int(self._read_before[i][source]) + n) for source, n in dealt
        ]

    def next_rows(self, i: int, cursor: int) -> list[RowId]:
        """Of every source that stage i reads from, the first row behind `cursor` steps."""
        read = self._patterns[i].before((cursor - self.first[i]) * self.stages[i].batch_size)
        places = (self._read_before[i] + read).tolist()
        used = np.flatnonzero(self._patterns[i].counts)
        return [self._place(i, source, places[source]) for source in used.tolist()]

    def epoch(self, cursor: int) -> int:
        """Passes over the source that has been read most often at the length of the stage."""
        return max(row.epoch for row in self.next_rows(self.index(cursor), cursor))

    def hash(self, cursor: int) -> str:
        """Of the plans that the stage behind `cursor` steps reads from."""
        i = len(self.begun(cursor)) - 1
        seq_len, digest = self.stages[i].seq_len, hashlib.sha256()
        for source, epoch, _ in self.next_rows(i, cursor):
            digest.update(f"{source} {self._rows(source, seq_len).hash(epoch)}\n".encode())
        return digest.hexdigest()

    def begun(self, cursor: int) -> list[Stage]:
        """Stages of which something has been read, or would be next; they may not change."""
        return self.stages[: self.index(max(cursor - 1, 0)) + 1]

    def facts(self, cursor: int) -> dict[str, Any]:
        """Of the stages that have begun, by the keys of the configuration."""
        facts = {}
        for i, stage in enumerate(self.begun(cursor)):
            facts[f"steps before data.stages[{i}]"] = self.first[i]
            facts |= flatten(stage.facts(), f"data.stages[{i}].")
        return facts

    def index(self, cursor: int) -> int:
        """Of the stage that the step behind `cursor` steps belongs to."""
        return bisect_right(self.first, cursor) - 1

    def _taken(self, stage: int) -> NDArray[np.int64]:
        """[sources]: rows of the length of this stage that the stages before it read."""
        taken = np.zeros(len(self.sources), np.int64)
        for i, earlier in enumerate(self.stages[:stage]):
            if earlier.seq_len == self.stages[stage].seq_len:
                taken += self._patterns[i].before((earlier.steps or 0) * earlier.batch_size)
        return taken

    def _place(self, stage: int, source: int, n: int) -> RowId:
        """The n-th row of a source, counted over its epochs."""
        name, seq_len = self.sources[source], self.stages[stage].seq_len
        ends = self._ends.setdefault((name, seq_len), [0])
        while n >= ends[-1]:
            ends.append(ends[-1] + self._rows(name, seq_len).count(len(ends) - 1))
        epoch = bisect_right(ends, n) - 1
        return RowId(name, epoch, n - ends[epoch])
