"""What holds for every test."""

import logging
from collections.abc import Iterator

import pytest

LONGEST = (  # tests/..., in the order in which workers begin them, before all others
    "trainer/test_resume_matrix.py",
    "trainer/test_deepspeed.py",
    "trainer/test_context_parallel.py",
    "trainer/test_objectives.py",
    "trainer/test_engines.py",
    "trainer/test_accelerate.py",
    "kills/test_kills.py",
    "trainer/test_faults.py",
    "trainer/test_reading.py",
    "trainer/evals/test_on_ranks.py",
    "trainer/test_mixers_on_ranks.py",
    "trainer/test_main.py",
    "trainer/test_loop.py",
    "trainer/test_two_ranks.py",
    "trainer/checkpoint/test_portable.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A long file that came last would leave the other worker with nothing to do."""
    # Here, and so not by the process that hands out the tests: it takes seconds.
    import tests.launch  # noqa: F401  what every new process has imported
    from tests import quick_hydra

    quick_hydra.install()
    place = {f"tests/{file}": i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(autouse=True)
def log_handlers() -> Iterator[None]:
    """A command leaves its handlers to the process: a later test would write to a closed stream."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before
