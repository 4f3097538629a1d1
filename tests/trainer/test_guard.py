"""Steps that are not taken: what is told, what stays as it was, and where the run goes on."""

import json
import math
import re

import pytest
import torch

from tests.trainer.tiny import QUICK, build, records
from trainer.errors import TrainingError
from trainer.guard import Fault, Guard, Spike
from trainer.loop import Trainer

SAVING = [*QUICK, "trainer.steps=8", "checkpoint.every=2", "checkpoint.keep=0"]
SAVING += ["data.batch_size=2", "trainer.micro_batch_size=1"]


def rows(source: str) -> tuple[int, int]:
    """(epoch, row) of a batch of one row, by the name that messages give it."""
    epoch, row = re.match(r"epoch (\d+) row (\d+)", source).groups()
    return int(epoch), int(row)


def poison(trainer: Trainer, bad: dict[tuple[int, int], float]) -> list[tuple[int, int]]:
    """Multiplies the loss of these rows by a factor; -> the rows as they are read."""
    forward, seen = trainer.engine.loss.forward, []

    def poisoned(batch):
        seen.append(rows(batch.source))
        return forward(batch) * bad.get(seen[-1], 1.0)

    trainer.engine.loss.forward = poisoned
    return seen


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.engine.state()
    state["buffers"] = dict(trainer.engine.model.named_buffers())  # router counts too
    return {f"{k}.{n}": x.clone() for k, part in state.items() for n, x in part.items()}


def test_a_spike_is_far_above_what_was_usual():
    guard = Guard(spike=Spike(deviations=3.0, window=4, action="rollback"))
    assert [guard.judge(x, 1.0) for x in (90.0, 2.0, 4.0, 2.0, 4.0)] == [None] * 5
    assert guard.judge(6.0, 1.0) is None  # 3 +- 1; then 4 +- 1.41
    fault = guard.judge(8.3, 1.0)
    assert fault == Fault("loss 8.3 after 4.0000 +- 1.4142 in 4 steps", "rollback")
    assert guard.judge(8.2, 1.0) is None  # the spike did not count
    assert Guard().judge(1e9, 1.0) is None


def test_skips_in_a_row_and_rollbacks_are_bounded():
    guard = Guard(nonfinite="skip", max_skips=2)
    actions = [guard.judge(x, 1.0) for x in (math.nan, math.inf, 1.0, math.nan, math.nan, math.nan)]
    assert [fault and fault.action for fault in actions] == ["skip"] * 2 + [None] + [
        "skip",
        "skip",
        "stop",
    ]
    assert actions[-1].reason == "loss nan, grad_norm 1.0, after 2 skipped steps"
    assert Guard(nonfinite="rollback", rollbacks=2).judge(1.0, math.inf).action == "rollback"
    fault = Guard(nonfinite="rollback", rollbacks=3).judge(1.0, math.inf)
    assert fault == Fault("loss 1.0, grad_norm inf, after 3 rollbacks", "stop")


def test_a_guard_goes_on_where_another_was():
    first = Guard(nonfinite="skip", spike=Spike(deviations=2.0, window=3), rollbacks=1)
    for loss in (1.0, 2.0, 3.0, math.nan):
        first.judge(loss, 1.0)
    second = Guard(nonfinite="skip", spike=Spike(deviations=2.0, window=3))
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert [second.judge(x, 1.0) for x in (9.0, 3.0)] == [first.judge(x, 1.0) for x in (9.0, 3.0)]


def test_a_skipped_step_changes_nothing_but_the_place(tmp_path):
    trainer = build(tmp_path, *SAVING, "trainer.nonfinite=skip")
    poison(trainer, {(0, 5): math.nan})
    for _ in range(2):
        trainer.train_step()
    before = everything(trainer)
    record = trainer.train_step()
    assert record["skipped"] is True and record["step"] == 3
    assert record["loss"] is None and record["grad_norm"] is None
    torch.testing.assert_close(everything(trainer), before, rtol=0, atol=0)
    assert all(p.grad is None for p in trainer.engine.model.parameters())
    line = json.loads(trainer.bad_batches.read_text())
    assert line["step"] == 3 and line["action"] == "skip"
    assert line["reason"] == "loss nan, grad_norm nan"
    assert line["loss"] is None and line["grad_norm"] is None
    assert [rows(source) for source in line["batches"][0]] == [(0, 4), (0, 5)]
    assert "skipped" not in trainer.train_step()


def test_a_run_with_skipped_steps_resumes_bitwise(tmp_path):
    more = [*SAVING, "trainer.nonfinite=skip", "trainer.steps=6"]
    more += ["logging.every=1", "logging.tensorboard=true"]
    whole = build(tmp_path, *more)
    poison(whole, {(0, 5): math.nan, (0, 8): math.inf})  # steps 3 and 5
    whole.run()
    expected = records(tmp_path / "run")
    assert [r["step"] for r in expected if "skipped" in r] == [3, 5]
    half = tmp_path / "run" / "checkpoints" / "step_00000004"
    resumed = build(tmp_path, *more, f"resume={half}")
    poison(resumed, {(0, 5): math.nan, (0, 8): math.inf})
    resumed.run()
    for key in ("step", "loss", "grad_norm", "tokens", "epoch"):
        assert [r[key] for r in records(tmp_path / "run")] == [r[key] for r in expected], key
    torch.testing.assert_close(everything(resumed), everything(whole), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nonfinite", "spike"])
def test_a_rollback_leaves_out_what_was_seen_since(tmp_path, kind):
    """From step 6 to the checkpoint of step 2; the data goes on behind step 6."""
    policy = ["trainer.nonfinite=rollback"]
    if kind == "spike":
        policy = ["trainer.spike={deviations:9,window:3,action:rollback}"]
    trainer = build(tmp_path, *SAVING, *policy, "trainer.rollback_steps=3")
    seen = poison(trainer, {(1, 1): math.nan if kind == "nonfinite" else 40.0})
    at_two = {}
    save = trainer.store.save

    def watched(step, *args, **kwargs):
        at_two.setdefault(step, everything(trainer))
        return save(step, *args, **kwargs)

    trainer.store.save = watched
    while trainer.guard.rollbacks == 0:
        if (record := trainer.train_step()) is not None:
            for sink in trainer.sinks:
                sink.log(record)
            if trainer.step % 2 == 0:
                trainer.save()
    assert (trainer.step, len(seen)) == (2, 12)
    torch.testing.assert_close(everything(trainer), at_two[2], rtol=0, atol=0)
    trainer.run()
    per_epoch = trainer.loader.stream.data.rows("", 48).count(0)
    order = [divmod(i, per_epoch) for i in range(24)]
    assert seen == order
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, 9))
    line = json.loads((tmp_path / "run" / "bad_batches.jsonl").read_text())
    assert (line["step"], line["action"]) == (6, "rollback")


def test_a_run_that_went_back_resumes_bitwise(tmp_path):
    """Before the checkpoint that it left it takes the same way again."""
    more = [*SAVING, "trainer.nonfinite=rollback", "trainer.rollback_steps=3"]
    whole = build(tmp_path, *more)
    poison(whole, {(1, 1): math.nan})
    whole.run()
    expected, end = records(tmp_path / "run"), everything(whole)
    for step in (2, 4, 6):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step_{step:08}"
        resumed = build(tmp_path, *more, f"resume={checkpoint}")
        poison(resumed, {(1, 1): math.nan})
        resumed.run()
        for key in ("step", "loss", "grad_norm", "tokens", "epoch"):
            assert [r[key] for r in records(tmp_path / "run")] == [r[key] for r in expected], key
        torch.testing.assert_close(everything(resumed), end, rtol=0, atol=0)


def test_a_run_that_stops_leaves_the_batch_too(tmp_path):
    trainer = build(tmp_path, *SAVING)
    poison(trainer, {(0, 2): math.inf})
    with pytest.raises(
        TrainingError, match="step 2: loss inf, grad_norm nan in batch epoch 0 row 2"
    ):
        trainer.run()
    line = json.loads(trainer.bad_batches.read_text())
    assert (line["step"], line["action"], len(line["batches"][0])) == (2, "stop", 2)


def test_nowhere_to_go_back_to(tmp_path):
    trainer = build(tmp_path, *SAVING, "trainer.nonfinite=rollback", "trainer.rollback_steps=4")
    poison(trainer, {(0, 5): math.nan})
    with pytest.raises(TrainingError, match="step 3: no checkpoint to go back to at step -1 or be"):
        trainer.run()
    assert json.loads(trainer.bad_batches.read_text())["action"] == "rollback"
