"""Steps that all ranks take together, or none."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from trainer.errors import ConfigError

T = TypeVar("T")


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def together(action: Callable[[], T]) -> list[T]:
    """What `action` returned on every rank, by rank.

    Every rank reaches the vote, whatever happens to it before. If one failed all raise:
    ConfigError if it did, else RuntimeError. Collectives inside `action` must themselves end on
    all ranks when one fails, as those of torch.distributed.checkpoint do.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    vote = (result, None if failure is None else _describe(failure))
    votes = [vote]
    if process_ranks() > 1:
        votes = [vote] * process_ranks()
        dist.all_gather_object(votes, vote)
    for rank, (_, message) in enumerate(votes):
        if message is not None:
            is_config, text = message
            error_type = ConfigError if is_config else RuntimeError
            raise error_type(text if is_config else f"rank {rank}: {text}") from failure
    return [result for result, _ in votes]


def _describe(failure: Exception) -> tuple[bool, str]:
    is_config = isinstance(failure, ConfigError)
    return is_config, str(failure) if is_config else repr(failure)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns whenever a single process uses it, which is fine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield
