"""The command line on two ranks: the same losses and weights as one."""

import json

import pytest
import torch

from tests.launch import torchrun
from tests.models.build import compose
from tests.trainer.tiny import QUICK, overrides, records
from trainer import main
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import open_weights
from trainer.console import close_logging


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run: two ranks, two steps; alone: one process."""
    folder = tmp_path_factory.mktemp("two_ranks")
    common = overrides(folder, *QUICK, "trainer.micro_batch_size=2", "trainer.precision=fp64")
    common += ["trainer.steps=2", "eval.every=2", "data.cache_workers=1"]
    run = torchrun(2, "scripts/train.py", *common)
    assert "Warning" not in run.stderr and "error" not in run.stderr, run.stderr
    main.train(compose([*common, f"run_dir={folder / 'alone'}"]))
    close_logging()
    return folder


@pytest.mark.parametrize("name", ["run", "alone"])
def test_a_run_is_done(folder, name):
    assert json.loads((folder / name / "status.json").read_text())["outcome"] == "done"
    assert (folder / name / "checkpoints" / "step_00000002").is_dir()
    assert (folder / name / "train.log").read_text().count("step 2/2") == 1


def test_one_process_converts_what_two_wrote(folder):
    convert(source=str(folder / "run"), target=str(folder / "native"), format="native")
    two, one = open_weights(folder / "native"), open_weights(folder / "alone")
    assert two.shapes == one.shapes
    for name in two.shapes:
        torch.testing.assert_close(two.get(name), one.get(name), rtol=1e-7, atol=1e-9)


def test_two_ranks_train_like_one(folder):
    for two, one in zip(records(folder / "run"), records(folder / "alone"), strict=True):
        assert two["tokens"] == one["tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-7)
        assert two.keys() == one.keys()
        if "eval_loss" in one:
            assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-9)
