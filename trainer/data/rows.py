"""What a source of training rows is, whatever its rows are made of."""

from collections.abc import Sequence
from typing import Any, Protocol

from trainer.batch import Run


class Rows(Protocol):
    """Training rows of one source, a pure function of (epoch, row).

    What lies where is decided in the process that trains, and read in one that loads: `where` is
    asked for in the first, and what takes its answer is called in either. A source without a plan
    inherits these.
    """

    seq_len: int

    def count(self, epoch: int) -> int:
        """Rows of this epoch."""
        ...

    def read(self, epoch: int, row: int) -> list[Run]:
        """What lies in a row, from the left; at most seq_len tokens."""
        ...

    def hash(self, epoch: int) -> str:
        """Of all that `read` depends on."""
        ...

    def identity(self) -> dict[str, str | int | float]:
        """What the rows follow from, by the keys of the configuration; compared on resume."""
        ...

    def where(self, epoch: int, row: int) -> Any:
        """Small, and can be sent to another process."""
        return epoch, row

    def read_at(self, where: Any) -> list[Run]:
        return self.read(*where)

    def lengths(self, where: Any) -> list[int]:
        """Of the runs of a row."""
        return [len(run.tokens) for run in self.read_at(where)]

    def names(self, where: Any) -> Sequence[str]:
        """Of the documents in a row, for messages."""
        return ()


class RowSource(Protocol):
    """Something that rows of any length can be made of."""

    def rows(self, seq_len: int) -> Rows: ...
