"""A configuration so small that a run of a few steps takes about a second."""

import json
from pathlib import Path

import torch

from parallel.mesh import Mesh
from tests.models.build import compose
from trainer.build import build_trainer
from trainer.loop import Trainer

MODEL = [
    "model.d_model=16",
    "model.num_layers=4",
    "model.ffn.hidden=24",
    "model.moe.num_experts=4",
    "model.moe.hidden=8",
    "model.moe.shared_hidden=8",
    "mixer.kda.num_heads=2",
    "mixer.kda.head_dim=8",
    "mixer.mla.num_heads=2",
    "mixer.mla.kv_rank=12",
    "mixer.mla.nope_dim=8",
    "mixer.mla.rope_dim=4",
    "mixer.mla.v_dim=8",
    "mixer.nats_l.head_dim=8",
    "mixer.nats_l.chunk=8",
    *(f"mixer.{name}.num_heads=2" for name in ("gdn", "mamba2", "lightning")),
    *(f"mixer.{name}.head_dim=8" for name in ("gdn", "mamba2", "lightning")),
    "mixer.mamba2.state_dim=8",
]

# A third of the time, where neither micro-batches nor layers are what a test is about.
QUICK = ["trainer.micro_batch_size=4", "model.num_layers=2", "model.pattern=[kda,mla]"]


def overrides(folder: Path, *more: str) -> list[str]:
    """Trains on a few documents written to `folder`, in folder/run."""
    documents = folder / "documents"
    if not documents.exists():
        documents.mkdir()
        for i in range(12):
            (documents / f"{i}.txt").write_text(f"{i}: the quick brown fox " * (i % 4 + 1))
    return [
        *MODEL,
        "data=files",
        f"data.path={documents}",
        f"data.cache_dir={folder / 'cache'}",
        "data.seq_len=48",
        "data.batch_size=4",
        "data.eval_fraction=0.3",
        "trainer.steps=4",
        "trainer.keep_heap=false",
        f"run_dir={folder / 'run'}",
        *more,
    ]


def config(folder: Path, *more: str) -> dict:
    return compose(overrides(folder, *more))


def build(folder: Path, *more: str) -> Trainer:
    """In one process, with its files in folder/run."""
    (folder / "run").mkdir(exist_ok=True)
    alone = Mesh(device=torch.device("cpu"))
    return build_trainer(config(folder, *more), mesh=alone, run_dir=folder / "run")


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
