"""suite=mixers: every file of conf/mixer gets its rows."""

import pytest

from benchmarks import mixers
from tests.benchmarks.conftest import JOB, settings, tiny
from tests.models.build import MIXERS
from trainer.errors import ConfigError


@pytest.mark.usefixtures("in_process")
def test_every_mixer_in_every_dtype() -> None:
    some = settings(suite="mixers", dtypes=["fp32", "bf16"], lengths=[64])
    rates = {"fp32": 1e11, "bf16": 2e11}
    rows = list(mixers.rows(some, {"tiny": tiny()}, job=JOB, matmul=rates))
    assert [(r["name"], r["dtype"]) for r in rows] == [(m, d) for m in MIXERS for d in rates]
    for row in rows:
        assert row["milliseconds"] == pytest.approx(row["seconds"] * 1e3)
        assert row["of_matmul"] == pytest.approx(row["gflops"] * 1e9 / rates[row["dtype"]])


@pytest.mark.usefixtures("in_process")
def test_routed_attention_by_its_share_against_others() -> None:
    some = settings(suite="mixers", lengths=[64, 128], mixers=["gqa", "nats_l"], shares=[0, 0.5])
    rows = list(mixers.rows(some, {"tiny": tiny()}, job=JOB, matmul={"fp32": 1e11}))
    names = ["gqa", "nats_l 0%", "nats_l 50%"]
    assert [(r["name"], r["length"]) for r in rows] == [(n, x) for n in names for x in (64, 128)]
    for row, dense in zip(rows, 3 * rows[:2], strict=True):
        assert row["of_first_time"] == pytest.approx(row["seconds"] / dense["seconds"])
    kept = [list(mixers._alone(some, tiny()))[i][1]["mixer"]["nats_l"] for i in (1, 2)]
    assert [(k["router"], k["static_share"]) for k in kept] == [("strided", 0), ("strided", 0.5)]


def test_a_mixer_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mixers=rwkv: allowed: .*gqa"):
        list(mixers._alone(settings(mixers=["rwkv"]), tiny()))


def test_exponents_are_powers_of_the_length() -> None:
    short = {"length": 10, "seconds": 1.0, "growth_gib": 2.0}
    long = {"length": 30, "seconds": 9.0, "growth_gib": 6.0}
    mixers._derive(long, flops=1.0, matmul=1.0, earlier=short)
    assert long["time_exponent"] == pytest.approx(2) and long["memory_exponent"] == pytest.approx(1)
    assert mixers._exponent(long, short | {"growth_gib": 0.0}, "growth_gib") is None
