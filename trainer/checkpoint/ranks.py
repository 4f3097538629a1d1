"""The ranks of a run as checkpoints see them: steps that all take together, or none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.collectives import gather_objects
from trainer.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`group` is every process of the run, None for a single one.

    It is best a group of its own: a background save talks over it while the run trains.
    """

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def together(self, action: Callable[[], T]) -> list[T]:
        """What `action` returned on every rank, by rank.

        Every rank reaches the vote, whatever happens to it before. If one failed all raise alike:
        ConfigError or OSError if it did, with its line, else RuntimeError. Raises LostRankError
        where the vote itself cannot be held.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        vote = (result, None if failure is None else _describe(failure))
        votes = gather_objects(vote, self.group)
        for rank, (_, description) in enumerate(votes):
            if description is not None:
                kind, line = description
                raise kind(f"rank {rank}: {line}" if kind is RuntimeError else line) from failure
        return [result for result, _ in votes]

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returned on rank 0, the only one to take it, on all ranks."""
        results = self.together(lambda: action() if self.rank == 0 else None)
        return results[0]  # type: ignore[return-value]


def _describe(failure: Exception) -> tuple[type[Exception], str]:
    if isinstance(failure, ConfigError):
        return ConfigError, str(failure)
    if isinstance(failure, OSError):
        named = failure.filename is not None and failure.strerror is not None
        return OSError, f"{failure.filename}: {failure.strerror}" if named else str(failure)
    return RuntimeError, repr(failure)
