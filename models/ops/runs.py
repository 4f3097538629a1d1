"""Unbroken stretches of one document in a local row: what kernels take instead of masks.

Everything here is integers on the host, derived from `SequenceInfo.fragments`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

from models.sequence import Fragment

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens start..stop of a row, of which the first has this index and position."""

    start: int
    stop: int
    index: int
    position: int

    @property
    def document(self) -> int:
        """Global index at which the document starts."""
        return self.index - self.position

    def goes_on_in(self, run: "Run") -> bool:
        follows = self.index + self.stop - self.start == run.index
        return follows and self.document == run.document


@lru_cache(maxsize=1024)
def runs(row: tuple[Fragment, ...]) -> tuple[Run, ...]:
    """The fragments of a row, those that continue each other joined."""
    joined: list[Run] = []
    start = 0
    for fragment in row:
        run = Run(start, start + fragment.length, fragment.index, fragment.position)
        if joined and joined[-1].goes_on_in(run):
            joined[-1] = replace(joined[-1], stop=run.stop)
        elif fragment.length:
            joined.append(run)
        start = run.stop
    return tuple(joined)


def unordered_runs(row: tuple[Fragment, ...]) -> tuple[Run, ...]:
    """`runs` where the order of tokens does not matter: neighbours of one document are joined, even
    behind a gap, under the index and position of the first."""
    groups = (list(group) for _, group in groupby(runs(row), key=attrgetter("document")))
    return tuple(replace(group[0], stop=group[-1].stop) for group in groups)


def grouped_rows(plans: Sequence[T]) -> Iterator[tuple[slice, T]]:
    """(rows, plan) for neighbouring rows of equal plans: kernels take them as one batch."""
    start = 0
    for plan, group in groupby(plans):
        stop = start + sum(1 for _ in group)
        yield slice(start, stop), plan
        start = stop
