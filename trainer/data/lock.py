"""One process of a machine at a time, and the others do not wait for ever."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trainer.errors import ConfigError
from trainer.locks import NoLocksError, try_lock

_PAUSE = 0.1  # seconds between two looks

logger = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, *, minutes: float) -> Iterator[bool]:
    """While entered no other process of this machine is, for the same path; unless it gives False,
    where the file system has no locks.

    Raises OSError if the folder of `path` cannot be written, ConfigError if the lock is not free
    for so many minutes.
    """
    file_path = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_path.open("w") as file:
        yield _wait(file, path, minutes)


def _wait(file: TextIO, path: Path, minutes: float) -> bool:
    end = time.monotonic() + 60 * minutes
    told = False
    while True:
        try:
            if try_lock(file):
                return True
        except NoLocksError:
            return False
        if not told:
            logger.info("waiting for another process, which prepares %s", path)
            told = True
        if time.monotonic() >= end:
            raise ConfigError(
                f"after {minutes:g} minutes another process still prepares {path}; allowed: to "
                "wait for it, or a larger data.cache_wait_minutes"
            )
        time.sleep(_PAUSE)
