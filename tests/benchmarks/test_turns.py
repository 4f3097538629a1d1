"""A step of each run in turn."""

import time

import pytest

from benchmarks import turns

TRAIN = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[-1].partition("=")[2])
folder.mkdir()
with (folder / "metrics.jsonl").open("w") as lines:
    for step in range(1, 100):
        time.sleep(0.05)
        record = {"tokens": 10, "peak_memory_gib": 1.5, "comm_bytes": 2_000_000}
        lines.write(json.dumps(record) + "\\n")
        lines.flush()
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """With a training script that takes no time to start."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(TRAIN)
    monkeypatch.setattr(turns, "ROOT", tmp_path)
    return tmp_path


def test_a_run_rests_outside_its_turns(root) -> None:
    runner = turns.Runner(root / "a", [], threads=1)
    assert runner.turn(2) > 0.1
    seen = len(runner.records())
    time.sleep(0.3)
    assert len(runner.records()) == seen <= 3
    runner.end()
    with pytest.raises(RuntimeError, match=r"^a ended; see .*a\.log$"):
        runner.turn(100)


def test_rows_are_of_steps_in_turn(root) -> None:
    first, second = turns.measure({"a": "", "b": ""}, root, "", rounds=3, threads=1)
    assert (first["run"], first["ratio"], second["run"]) == ("a", 1, "b")
    assert len(second["seconds"]) == 3 and second["peak_memory_gib"] == 1.5
    assert second["comm_mb"] == 2
    assert second["tokens_per_s"] == pytest.approx(10 * 3 / sum(second["seconds"]))
