"""Engines on a CUDA device: one rank, so all the streams and copies but no second device."""

import json

import pytest
import torch

from tests.launch import torchrun
from tests.trainer.tiny import overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
JOBS = {
    "ddp": ["engine=ddp"],
    "fsdp2": ["engine=fsdp2", "trainer.activation_checkpointing=true"],
    "offloaded": ["engine=fsdp2", "engine.cpu_offload=true", "checkpoint.every=2"],
    "resumed": ["engine=fsdp2"],
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("engines")
    sizes = ["model.d_model=64", "model.moe.hidden=16", "mixer.kda.head_dim=64"]
    common = [*overrides(folder), *sizes, "trainer.precision=bf16", "trainer.micro_batch_size=2"]
    saved = folder / "offloaded" / "checkpoints" / "step_00000002"
    jobs = [[*common, *more, f"run_dir={folder / name}"] for name, more in JOBS.items()]
    jobs[-1].append(f"resume={saved}")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run = torchrun(1, "-m", "tests.trainer.jobs_on_ranks", str(folder / "jobs.json"), seconds=280)
    assert "Warning" not in run.stderr, run.stderr
    lines = {name: (folder / name / "metrics.jsonl").read_text().splitlines() for name in JOBS}
    return {name: [json.loads(line)["loss"] for line in lines[name]] for name in JOBS}


@pytest.mark.parametrize("name", ["fsdp2", "offloaded"])
def test_shards_train_like_whole_parameters(losses, name):
    assert losses[name] == pytest.approx(losses["ddp"], rel=1e-3)


def test_a_run_leaves_host_memory(losses):
    assert losses["resumed"] == pytest.approx(losses["offloaded"][2:], rel=1e-3)
