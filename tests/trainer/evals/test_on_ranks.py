"""Evaluation while training: the same figures under every scheme and engine, with pictures."""

import pytest

from tests.trainer.runs import Runs

RUN = [
    *("model.pattern=[kda,mla]", "model.num_layers=2", "model.init_std=0.3"),
    *("mixer.kda.num_heads=4", "mixer.mla.num_heads=4"),
    *("data.seq_len=48", "data.batch_size=4", "trainer.steps=1", "trainer.micro_batch_size=2"),
    *("optim.lr=1e-12", "eval.every=1", "eval.tasks=[perplexity,position,niah,kv,copy,mqar]"),
    *("tasks.position.length=31", "tasks.niah.lengths=[170]", "tasks.niah.samples=1"),
    *("tasks.kv.lengths=[48,131]", "tasks.kv.depths=[0.5,1.0]", "tasks.kv.samples=3"),
    *("tasks.copy.lengths=[9]", "tasks.copy.samples=7", "tasks.mqar.lengths=[33]"),
    "tasks.mqar.samples=5",
]
EXACT = "trainer.precision=fp64"
RING = ["parallel=ring", "parallel.layout=zigzag"]
FSDP2 = ["engine=accelerate", "ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2"]
JOBS = {
    "ring": [EXACT, *RING],
    "fsdp2 ulysses": ["undrawn", EXACT, "engine=fsdp2", "parallel=ulysses"],
    "accelerate fsdp2": ["undrawn", EXACT, *FSDP2],
    "zero3 ring": ["undrawn", "engine=zero3", "engine.whole_below=0", *RING],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("evals"), RUN)
    runs.alone("alone", EXACT)
    runs.on_ranks(2, {name: [*more, "unsaved"] for name, more in JOBS.items()})
    return runs


def figures(runs: Runs, name: str) -> dict[str, float]:
    (record,) = runs.records(name)
    return {key: x for key, x in record.items() if key.startswith("eval_")}


@pytest.mark.parametrize("name", JOBS)
def test_ranks_score_like_one(runs, name):
    got, expected = figures(runs, name), figures(runs, "alone")
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        exact = EXACT in JOBS[name]
        assert got[key] == pytest.approx(value, rel=1e-9 if exact else 1e-5, abs=0), key


def test_a_record_has_the_figures_of_every_task(runs):
    got = figures(runs, "alone")
    assert list(got) == [
        *("eval_loss", "eval_perplexity", "eval_tokens"),
        *(f"eval_position_loss_{i}" for i in (1, 2, 4, 8, 16)),
        *(f"eval_niah_{x}" for x in ("accuracy", "token_accuracy", "loss", "accuracy_170")),
        *(f"eval_kv_{x}" for x in ("accuracy", "token_accuracy", "loss")),
        *("eval_kv_accuracy_48", "eval_kv_accuracy_131"),
        *(f"eval_copy_{x}" for x in ("accuracy", "token_accuracy", "loss", "accuracy_9")),
        *(f"eval_mqar_{x}" for x in ("accuracy", "token_accuracy", "loss", "accuracy_33")),
    ]
    losses = [x for key, x in got.items() if "loss" in key]
    assert len(set(losses)) == len(losses) and all(x > 1 for x in losses)


@pytest.mark.parametrize("name", ["alone", "ring"])
def test_the_main_process_draws(runs, name):
    drawn = sorted(path.name for path in (runs.path / name / "eval").iterdir())
    tasks = ("copy", "kv", "mqar", "niah", "position")
    assert drawn == [f"{task}_step_00000001.png" for task in tasks]
    for path in (runs.path / name / "eval").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
