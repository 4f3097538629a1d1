"""What a user can put right, and what ends a run."""

import contextlib
from collections.abc import Iterator


class ConfigError(Exception):
    """Bad configuration or input: one line naming the key or file, its value and what is allowed.

    The entry points print the line and exit with code 2.
    """


@contextlib.contextmanager
def naming(key: str, value: object) -> Iterator[None]:
    """Puts the key and its value before the line of a ConfigError that names a file only."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}={value}: {error}") from error


class TrainingError(Exception):
    """The run cannot go on, e.g. a loss that is not finite: one line naming step and batch.

    The entry point prints the line and exits with code 1.
    """
