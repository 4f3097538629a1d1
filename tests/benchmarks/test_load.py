"""Waiting for a quiet machine."""

import pytest

from benchmarks import load


@pytest.mark.parametrize(
    ("cores", "patience", "waits"), [(0.0, 60, 1), (1.0, 3, 3), (0.05, 60, 1), (1.0, 0, 0)]
)
def test_waits_while_others_work(cores, patience, waits, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(load.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(load.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(load, "busy_seconds", lambda: 1000 + cores * now[0])
    load.wait_until_quiet(patience)
    assert now[0] == waits
