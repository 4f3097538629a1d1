"""The loop on a tiny model: what a step means, when it stops, what it leaves."""

import errno
import functools
import json
import math
import threading

import pytest
import torch
from torch._dynamo.utils import counters

from parallel.mesh import Mesh
from tests.trainer.tiny import QUICK, config
from trainer.build import build_trainer
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.staging import HostBuffers
from trainer.checkpoint.weights import open_weights
from trainer.errors import ConfigError, TrainingError
from trainer.loop import Trainer

MESH = Mesh(device=torch.device("cpu"))


@pytest.fixture
def make(tmp_path):
    def make(*more: str) -> Trainer:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        return build_trainer(config(tmp_path, *more), mesh=MESH, run_dir=run_dir)

    return make


def records(tmp_path) -> list[dict]:
    return [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in trainer.engine.model.state_dict().items()}


def test_micro_batches_and_checkpointing_change_nothing(make):
    """Also with labels spread unevenly over micro-batches, as padding does it here."""
    runs = []
    for more in (
        ["trainer.micro_batch_size=4"],
        ["trainer.micro_batch_size=1"],
        ["trainer.micro_batch_size=2", "trainer.activation_checkpointing=true"],
    ):
        trainer = make("trainer.precision=fp64", *more)
        steps = [trainer.train_step() for _ in range(2)]
        runs.append(([(s["loss"], s["grad_norm"], s["tokens"]) for s in steps], weights(trainer)))
    for steps, end in runs[1:]:
        assert steps == [pytest.approx(step, rel=1e-9) for step in runs[0][0]]
        torch.testing.assert_close(end, runs[0][1], rtol=1e-7, atol=1e-9)


def test_compiling_changes_nothing(make, monkeypatch):
    """Also under checkpointing, where it must not be given up without a word."""
    backend = functools.partial(torch.compile, backend="aot_eager")  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", backend)
    runs = []
    for more in ([], ["trainer.compile=true", "trainer.activation_checkpointing=true"]):
        counters.clear()
        trainer = make(*QUICK, "trainer.precision=fp64", *more)
        steps = [trainer.train_step() for _ in range(2)]
        assert bool(counters["stats"]["unique_graphs"]) == bool(more)
        runs.append(([(s["loss"], s["grad_norm"]) for s in steps], weights(trainer)))
    (steps, end), (compiled_steps, compiled_end) = runs
    assert compiled_steps == [pytest.approx(step, rel=1e-9) for step in steps]
    torch.testing.assert_close(compiled_end, end, rtol=1e-7, atol=1e-9)


def test_the_loss_is_the_mean_over_the_labels_of_the_step(make):
    trainer = make("trainer.precision=fp64")
    batches = trainer.loader.stream.next_step()
    trainer.loader.stream.restore(make().loader.stream.state())
    with torch.no_grad():
        total = sum(float(trainer.engine.loss(batch)) for batch in batches)
    labels = sum(batch.valid_labels for batch in batches)
    record = trainer.train_step()
    assert record["tokens"] == labels < 4 * 48
    assert record["loss"] == pytest.approx(total / labels, rel=1e-12)


def test_a_record_has_every_number(make):
    record = make().train_step()
    assert list(record) == [
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "tflops_per_device",
        "mfu", "peak_memory_gib", "seconds", "data_wait", "epoch",
    ]  # fmt: skip
    assert record["mfu"] is None and record["step"] == 1 and record["epoch"] == 0
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])


def test_flops_count_documents_and_no_padding(make):
    trainer = make()
    batches = trainer.loader.stream.next_step()
    trainer.loader.stream.restore(make().loader.stream.state())
    valid = torch.cat([batch.info.valid.flatten() for batch in batches])
    seen = torch.cat([batch.info.positions.flatten() for batch in batches])[valid] + 1
    flops = 3 * len(seen) * trainer.blueprint.flops_per_token(float(seen.double().mean()))
    record = trainer.train_step()
    assert record["tflops_per_device"] * record["seconds"] * 1e12 == pytest.approx(flops, rel=1e-9)
    assert not valid.all()


def test_clipping_scales_the_step_and_not_the_record(make):
    free, clipped = make("trainer.grad_clip=null"), make("trainer.grad_clip=1e-3")
    assert free.train_step()["grad_norm"] == clipped.train_step()["grad_norm"] > 1e-3
    average = [s["exp_avg"].square().sum() for s in clipped.engine.optimizer.state.values()]
    assert math.sqrt(sum(average)) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # 1 - beta1 = 0.1


def test_router_biases_follow_the_load_once_per_step(make):
    trainer = make("trainer.router_bias_rate=0.25", "trainer.micro_batch_size=2")
    counted = []
    for router in trainer.engine.model.routers():
        update = router.update_bias
        router.update_bias = lambda c, rate, update=update: (
            counted.append(c.clone()),
            update(c, rate),
        )
    batches = trainer.loader.stream.next_step()
    trainer.loader.stream.restore(make().loader.stream.state())
    trainer.train_step()
    routed = 2 * sum(int(batch.info.valid.sum()) for batch in batches)  # top_k = 2
    assert [int(counts.sum()) for counts in counted] == [routed] * 3
    for router, counts in zip(trainer.engine.model.routers(), counted, strict=True):
        load = counts.double()
        torch.testing.assert_close(router.bias, (0.25 * (load.mean() - load).sign()).float())
        assert not router.counts.any()


def test_evaluation_leaves_no_trace(make, tmp_path):
    """The mean over all held-out labels; training goes on as if it had not been."""
    plain, watched = make(), make()
    with torch.no_grad():
        batches = list(watched.suite.bench.data.eval_batches(micro_batch_size=1))
        total = sum(float(watched.engine.loss(batch)) for batch in batches)
    labels = sum(batch.valid_labels for batch in batches)
    figures = watched.evaluate()
    assert figures["eval_loss"] == pytest.approx(total / labels, rel=1e-6)
    assert figures["eval_tokens"] == labels > 0
    assert plain.train_step()["grad_norm"] == watched.train_step()["grad_norm"]
    torch.testing.assert_close(weights(watched), weights(plain), rtol=0, atol=0)


def test_saves_on_schedule_and_the_last_step_once(make, tmp_path):
    trainer = make(*QUICK, "checkpoint.every=2", "checkpoint.keep=0", "eval.every=3")
    saved = []
    save = trainer.store.save

    def watched(step, *args, **kwargs):
        saved.append((step, len(records(tmp_path))))
        return save(step, *args, **kwargs)

    trainer.store.save = watched
    path = trainer.run()
    assert saved == [(2, 2), (4, 4)]  # the line of a step is there before its checkpoint
    assert path == tmp_path / "run" / "checkpoints" / "step_00000004"
    assert ["eval_loss" in record for record in records(tmp_path)] == [False, False, True, False]
    assert make(*QUICK, "checkpoint.every=2").run() is None  # nothing is left to do


@pytest.mark.parametrize(
    "more", [[], ["trainer.precision=fp64", "checkpoint.background=false"], ["engine.bucket_mb=1"]]
)
def test_resuming_is_bitwise(make, tmp_path, more):
    fixed = [*QUICK, "trainer.micro_batch_size=2", "schedule.total_steps=4"]
    fixed += ["checkpoint.every=2", "checkpoint.keep=0", *more]
    whole = make(*fixed)
    whole.run()
    expected, end = records(tmp_path), weights(whole)
    resumed = make(*fixed, f"resume={tmp_path / 'run' / 'checkpoints' / 'step_00000002'}")
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
    resumed.run()
    for key in ("step", "loss", "grad_norm", "lr", "tokens", "epoch"):
        assert [r[key] for r in records(tmp_path)] == [r[key] for r in expected], key
    torch.testing.assert_close(weights(resumed), end, rtol=0, atol=0)


def test_a_checkpoint_holds_its_step_though_the_next_one_goes_on(make, tmp_path, monkeypatch):
    """Its copies are taken as late as can be: when the step that follows waits for them."""
    trainer = make(*QUICK, "checkpoint.every=2", "checkpoint.keep=0")
    copy, wait, asked = HostBuffers.copy, trainer.store.wait_staged, threading.Event()
    saved = {}

    def late_copy(self, state):
        assert asked.wait(20)
        return copy(self, state)

    def wait_staged():
        asked.set()
        wait()

    save = trainer.store.save

    def noting_save(step, *args, **facts):
        asked.clear()
        saved[step] = weights(trainer)
        save(step, *args, **facts)
        if step == trainer.steps:
            asked.set()

    monkeypatch.setattr(HostBuffers, "copy", late_copy)
    trainer.store.wait_staged, trainer.store.save = wait_staged, noting_save
    trainer.run()
    assert list(saved) == [2, 4]
    for step, expected in saved.items():
        source = open_weights(tmp_path / "run" / "checkpoints" / f"step_{step:08}")
        torch.testing.assert_close({n: source.get(n) for n in expected}, expected, rtol=0, atol=0)


def test_a_save_that_fails_ends_the_run_only_if_it_is_the_last(make, tmp_path, monkeypatch, caplog):
    seal, full = CheckpointFolder.seal, {2}

    def sometimes(self, step, *args, **facts):
        if step in full:
            raise OSError(errno.ENOSPC, "No space left on device", "a file")
        seal(self, step, *args, **facts)

    monkeypatch.setattr(CheckpointFolder, "seal", sometimes)
    assert make(*QUICK, "trainer.steps=3", "checkpoint.every=1").run().name == "step_00000003"
    line = "step 2 is not saved: a file: No space left on device"
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [line]
    full.add(5)
    with pytest.raises(TrainingError, match="step 5 is not saved: a file: No space left"):
        make(*QUICK, "trainer.steps=5", "checkpoint.every=1").run()
    assert len(records(tmp_path)) == 5
    assert make(*QUICK, "trainer.steps=6").step == 4


@pytest.mark.parametrize(
    ("more", "name", "values"),
    [
        ([], "eval_loss", [3.0, 1.0, 2.0, 4.0]),
        (["checkpoint.best_direction=max"], "eval_kv_accuracy", [0.1, 0.7, 0.3, 0.0]),
    ],
)
def test_the_best_checkpoints_are_those_of_the_best_figure(make, tmp_path, more, name, values):
    trainer = make(
        *QUICK,
        *("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=2", "eval.every=1"),
        *("eval.tasks=[perplexity,kv]", "tasks.kv.lengths=[48]"),
        *(f"checkpoint.best_metric={name}", *more),
    )
    figures = iter(values)
    trainer.evaluate = lambda: {name: next(figures)}
    trainer.run()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000003", "step_00000004"]


def test_hyperparameters_are_the_configurations(make):
    make(*QUICK, "trainer.steps=2").run()
    resumed = make(*QUICK, "optim.weight_decay=0.7", "optim.betas=[0.5,0.6]")
    assert resumed.step == 2
    groups = resumed.engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert all(tuple(group["betas"]) == (0.5, 0.6) for group in groups)


def test_a_loss_that_is_not_finite_stops_the_run(make, tmp_path):
    trainer = make("trainer.steps=3", "checkpoint.every=2")
    forward, sources = trainer.engine.loss.forward, []

    def poisoned(batch):
        sources.append(batch.source)
        return forward(batch) * (math.nan if len(sources) == 10 else 1.0)  # 4 a step

    trainer.engine.loss.forward = poisoned
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    assert str(caught.value) == f"step 3: loss nan, grad_norm nan in batch {sources[9]}"
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert trainer.store.resolve("auto").name == "step_00000002"


def test_only_a_gradient_that_is_not_finite_stops_it_too(make):
    trainer = make()
    before = weights(trainer)
    trainer.engine.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match=r"step 1: loss \d.*grad_norm (inf|nan) in batch epoch"):
        trainer.run()
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)


def test_a_used_folder_is_not_started_over(make):
    make(*QUICK, "trainer.steps=1").run()
    with pytest.raises(ConfigError, match=r"resume=none: .* already holds checkpoints"):
        make("resume=none")
    with pytest.raises(ConfigError, match=r"model.d_model=32"):
        make("model.d_model=32")
