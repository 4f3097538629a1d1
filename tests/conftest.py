"""What holds for every test."""

import logging
from collections.abc import Iterator

import pytest

import tests.launch  # noqa: F401  what every new process has imported


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """A command leaves its handlers to the process: a later test would write to a closed stream."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before
