"""suite=activations: rows in order, ratios to the first, errors of every parameter."""

import pytest
import torch

from benchmarks import activations
from benchmarks.job import Job, JobFailed
from benchmarks.measure import kept_bytes
from benchmarks.saved import errors
from tests.benchmarks.conftest import JOB, settings, tiny


@pytest.mark.usefixtures("in_process")
def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.saved.WARM_STEPS", 1)
    some = settings(suite="activations", lengths=[160], dtypes=["fp32"])
    rows = list(activations.rows(some, {"tiny": tiny()}, job=JOB, matmul={}))
    assert [row["name"] for row in rows] == [
        "exact", "int8", "fp8", "exact checkpointed", "int8 checkpointed", "fp8 checkpointed",
    ]  # fmt: skip
    exact, int8, fp8, *checkpointed = rows
    assert exact["error"] == exact["largest_error"] == checkpointed[0]["error"] == 0
    assert 0 < int8["error"] < fp8["error"] < 0.1
    assert int8["median_error"] < int8["largest_error"] and int8["worst"].startswith("layers.")
    assert exact["memory_ratio"] == 1 > int8["memory_ratio"] == fp8["memory_ratio"]
    assert int8["kib_per_token"] == int8["kept_bytes"] / 160 / 1024
    for row, plain in zip(checkpointed, rows, strict=False):
        assert row["kept_bytes"] < plain["kept_bytes"] and row["time_ratio"] > 0


def test_a_reference_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: Job, timeout: float) -> None:
        raise JobFailed("failed: killed by SIGKILL, probably out of memory")

    monkeypatch.setattr(Job, "run", fail)
    some = settings(suite="activations", lengths=[256, 512])
    rows = list(activations.rows(some, {"tiny": tiny()}, job=JOB, matmul={}))
    assert [row["note"][:24] for row in rows] == ["reference failed: killed"] * 2


def test_errors_are_relative_to_norms() -> None:
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0]), "c": torch.zeros(2)}
    got = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0]), "c": torch.zeros(2)}
    found = errors(got, expected)
    assert found["error"] == pytest.approx((0.25 + 144) ** 0.5 / 13)
    assert (found["median_error"], found["largest_error"]) == pytest.approx((0.55, 1.0))
    assert found["worst"] == "b"


def test_kept_bytes_are_those_of_new_storages_that_live_on() -> None:
    x = torch.ones(8, 16, requires_grad=True)
    _, nothing = kept_bytes(lambda: x.view(16, 8))
    assert nothing == 0
    output, kept = kept_bytes(lambda: (x.exp() * 2).sin().sum())  # exp's output and sin's input
    assert kept == 2 * x.nbytes + output.nbytes
