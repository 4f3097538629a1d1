"""suite=mixers: every file of conf/mixer gets its rows."""

import pytest

from benchmarks import mixers
from tests.benchmarks.conftest import JOB, settings, tiny
from tests.models.build import MIXERS


@pytest.mark.usefixtures("in_process")
def test_every_mixer_in_every_dtype() -> None:
    some = settings(suite="mixers", dtypes=["fp32", "bf16"], lengths=[64])
    rates = {"fp32": 1e11, "bf16": 2e11}
    rows = list(mixers.rows(some, {"tiny": tiny()}, job=JOB, matmul=rates))
    assert [(r["name"], r["dtype"]) for r in rows] == [(m, d) for m in MIXERS for d in rates]
    for row in rows:
        assert row["milliseconds"] == pytest.approx(row["seconds"] * 1e3)
        assert row["of_matmul"] == pytest.approx(row["gflops"] * 1e9 / rates[row["dtype"]])


def test_exponents_are_powers_of_the_length() -> None:
    short = {"length": 10, "seconds": 1.0, "growth_gib": 2.0}
    long = {"length": 30, "seconds": 9.0, "growth_gib": 6.0}
    mixers._derive(long, flops=1.0, matmul=1.0, earlier=short)
    assert long["time_exponent"] == pytest.approx(2) and long["memory_exponent"] == pytest.approx(1)
    assert mixers._exponent(long, short | {"growth_gib": 0.0}, "growth_gib") is None
