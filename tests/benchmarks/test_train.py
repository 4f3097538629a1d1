"""suite=train: the same weights on both sides, and what is derived from the measurements."""

import dataclasses

import pytest

from benchmarks import train
from benchmarks.job import Job, JobFailed
from benchmarks.subjects import make_model, train_step, transformers_step
from tests.benchmarks.conftest import JOB, settings, tiny

pytestmark = pytest.mark.usefixtures("in_process")


def run(configs, **changed):
    return list(train.rows(settings(**changed), configs, job=JOB, matmul={"fp32": 1e11}))


def test_peer_and_baseline_beside_ours() -> None:
    config = tiny()
    rows = run({"ours": config, "transformer": tiny("model=transformer")})
    names = ["ours", "transformers ours", "transformer"]
    assert [(row["name"], row["length"]) for row in rows] == [
        (n, s) for s in (16, 24) for n in names
    ]
    ours, peer, baseline, longer, skipped, _ = rows
    assert peer["loss_difference"] < 1e-6 and "note" not in peer
    assert "loss_difference" not in baseline and baseline["speed_ratio"] > 0
    assert skipped["note"] == "skipped: peer_max_tokens=16" and "seconds" not in skipped
    assert longer["tokens_per_second"] * longer["seconds"] == pytest.approx(24)
    flops = 3 * 24 * make_model(config).flops_per_token(12.5)
    assert longer["gflops"] * 1e9 * longer["seconds"] == pytest.approx(flops)
    assert longer["of_matmul"] == pytest.approx(longer["gflops"] / 100)
    assert longer["kib_per_token"] == pytest.approx(
        (longer["growth_gib"] - ours["growth_gib"]) * 2**20 / 8
    )


def test_both_sides_train_alike(tmp_path) -> None:
    """Not the first loss alone: three steps of the same optimiser on the same gradients."""
    config = tiny()
    assert train._export(config, tmp_path / "weights", seed=3) is None
    job = dataclasses.replace(JOB, config=config, weights=str(tmp_path / "weights"))
    ours, theirs = train_step(job), transformers_step(job)
    for _ in range(3):
        assert float(ours.step()) == pytest.approx(float(theirs.step()), rel=1e-5)


def test_other_weights_are_noticed(tmp_path) -> None:
    config, losses = tiny(), []
    for seed in (0, 1):
        weights = tmp_path / str(seed) / "weights"
        weights.parent.mkdir()
        train._export(config, weights, seed=seed)
        job = dataclasses.replace(JOB, config=config, weights=str(weights))
        losses.append(float(train_step(job).step()))
    for dtype in ("fp32", "bf16"):
        ours, peer = ({"dtype": dtype, "seconds": 1, "peak_gib": 1, "loss": x} for x in losses)
        train._compare(peer, ours, same_weights=True)
        assert peer["note"] == "losses differ: not the same weights or batch"


def test_ratios_say_how_much_better_we_are() -> None:
    ours = {"seconds": 2.0, "peak_gib": 1.0, "loss": 5.0}
    peer = {"seconds": 10.0, "peak_gib": 4.0, "loss": 5.0, "dtype": "fp32"}
    train._compare(peer, ours, same_weights=True)
    assert (peer["speed_ratio"], peer["memory_ratio"]) == (5.0, 0.25)


def test_family_that_cannot_hold_the_model() -> None:
    rows = run({"ours": tiny("model=transformer")}, lengths=[16])
    assert "seconds" in rows[0]
    assert rows[1]["note"].startswith("skipped: no published family can hold this model")


def test_failures_and_what_does_not_fit_are_rows(monkeypatch) -> None:
    def fake(job: Job, timeout: float) -> dict:
        if job.length == 32:
            raise JobFailed("failed: killed by SIGKILL")
        return {"seconds": 1.0, "loss": 5.0, "rest_gib": 1, "growth_gib": 2, "peak_gib": 3}

    monkeypatch.setattr(Job, "run", fake)
    monkeypatch.setattr(train, "free_memory_gib", lambda device: 8.9)
    rows = run({"ours": tiny()}, lengths=[16, 32, 48], peers=False)
    assert [row.get("note") for row in rows] == [
        None,
        "failed: killed by SIGKILL",
        "skipped: as the length before",
    ]
    rows = run({"ours": tiny()}, lengths=[16, 63, 256], peers=False)
    assert [row.get("note") for row in rows] == [None, None, "skipped: about 9.1 GiB, 8.9 free"]
