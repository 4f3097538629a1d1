"""suite=checkpoint: a save in either mode, and what it costs."""

import pytest

from benchmarks import checkpoint, report
from tests.benchmarks.conftest import JOB, settings, tiny


@pytest.mark.usefixtures("in_process")
def test_both_modes_in_ratios() -> None:
    some = settings(suite="checkpoint", lengths=[16])
    rows = list(checkpoint.rows(some, {"tiny": tiny()}, job=JOB, matmul={}))
    assert [row["name"] for row in rows] == ["sync", "background"]
    assert rows[0]["stall_ratio"] == rows[0]["lost_ratio"] == 1
    for row in rows:
        assert row["stall_seconds"] > 0 and row["save_seconds"] > 0
        assert row["bytes"] > row["state_bytes"] > 0
        assert row["bytes_ratio"] == pytest.approx(row["bytes"] / row["state_bytes"])
    assert "background" in report.table(rows, checkpoint.COLUMNS)
