"""Stages in a run: lengths, batches and rotary settings change where the tokens say, also behind a
resume, and a checkpoint is a model of the stage that it was written in."""

import pytest
import torch

from models.rope import Rope
from tests.trainer.tiny import build, records
from trainer.checkpoint.weights import open_weights
from trainer.errors import ConfigError

RUN = [
    "model.num_layers=2",
    "model.pattern=[mla,gqa]",
    "mixer.mla.rope_base=10000",
    "mixer.gqa.rope_base=null",
    "trainer.steps=6",
    "checkpoint.every=1",
    "checkpoint.keep=0",
]
STAGES = (
    "data.stages=[{tokens:384},{tokens:256,seq_len:64,batch_size:2,rope:{base:500,factor:4}},"
    "{seq_len:96,batch_size:2,rope:{factor:8}}]"
)


def ropes(trainer):
    return [(m.base, m.factor) for m in trainer.engine.model.modules() if isinstance(m, Rope)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, records, weights, the rotary setting of each step)."""
    folder = tmp_path_factory.mktemp("curriculum")
    trainer, settings = build(folder, *RUN, STAGES), []
    accumulate = trainer.engine.accumulate

    def watched(batch, scale, *, last):
        settings.append((trainer.step + 1, batch.tokens.shape[1], *ropes(trainer)))
        return accumulate(batch, scale, last=last)

    trainer.engine.accumulate = watched
    trainer.run()
    lines = [r | {"seconds": 0} for r in records(folder / "run")]
    return folder, lines, trainer.engine.model.state_dict(), settings


def checkpoint(folder, step):
    return folder / "run" / "checkpoints" / f"step_{step:08}"


def test_steps_have_the_length_batch_and_rotary_setting_of_their_stage(whole):
    _, _, _, settings = whole
    first, second, third = (48, (1e4, 1.0)), (64, (500.0, 4.0)), (96, (1e4, 8.0))
    assert settings == [
        (step, *stage)
        for step, stage, rows in (
            (1, first, 4), (2, first, 4), (3, second, 2), (4, second, 2), (5, third, 2),
            (6, third, 2),
        )
        for _ in range(rows)
    ]  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resuming_in_a_stage_and_at_its_end_is_bitwise(whole, tmp_path, step):
    folder, expected, weights, _ = whole
    more = [f"resume={checkpoint(folder, step)}", f"run_dir={tmp_path}"]
    resumed = build(tmp_path, *RUN, STAGES, *[o for o in common(folder)], *more)
    resumed.run()
    lines = records(tmp_path / "run")
    for key in ("step", "loss", "grad_norm", "tokens", "epoch"):
        assert [r[key] for r in lines] == [r[key] for r in expected[step:]], key
    for name, value in resumed.engine.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def common(folder):
    return [f"data.path={folder / 'documents'}", f"data.cache_dir={folder / 'cache'}"]


def test_a_stage_to_come_may_change_and_one_that_began_may_not(whole, tmp_path):
    folder, *_ = whole
    at_the_end = [*RUN, *common(folder), f"resume={checkpoint(folder, 2)}"]
    other = STAGES.replace("base:500", "base:99")
    build(tmp_path, *at_the_end, other, "trainer.steps=3").run()
    inside = [*RUN, *common(folder), f"resume={checkpoint(folder, 3)}"]
    with pytest.raises(ConfigError, match=r"data\.stages\[1\]\.rope\.base=99 \(checkpoint: 500\)"):
        build(tmp_path / "run", *inside, other)


@pytest.mark.parametrize(("step", "base", "factor"), [(2, 1e4, 1.0), (3, 500, 4), (5, 1e4, 8)])
def test_a_checkpoint_is_a_model_with_the_rotary_setting_of_its_stage(whole, step, base, factor):
    mixers = open_weights(checkpoint(whole[0], step)).config["mixer"]
    assert (mixers["mla"]["rope_base"], mixers["mla"]["rope_factor"]) == (base, factor)
    assert (mixers["gqa"]["rope_base"], mixers["gqa"]["rope_factor"]) == (None, 1.0)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([f"mixer.mla.rope_frequencies={[0.1] * 2}"], "rope_frequencies are given"),
        ([], "the model has no rotary positions"),
    ],
)
def test_a_stage_sets_what_the_model_can_take(whole, tmp_path, keys, reason):
    none = "mixer.mla.rope_base=null"
    with pytest.raises(ConfigError, match=rf"^data\.stages\[1\]\.rope: {reason}"):
        build(tmp_path, *RUN, *common(whole[0]), STAGES, none, *keys)
