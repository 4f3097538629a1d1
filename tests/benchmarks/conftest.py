"""Tiny models, and measurements in the process of the test instead of one of their own."""

import pytest
import torch

from benchmarks import worker
from benchmarks.job import Job
from benchmarks.settings import Settings
from tests.launch import alone
from tests.models.build import compose

TINY = (
    "model.d_model=32",
    "model.num_layers=4",
    "model.ffn.hidden=48",
    "model.moe={num_experts: 4, top_k: 2, hidden: 16, shared_hidden: 16, routed_scaling: 2.0}",
    "mixer.kda={num_heads: 2, head_dim: 16}",
    "mixer.mla={num_heads: 2, kv_rank: 24, nope_dim: 16, rope_dim: 8, v_dim: 16}",
    "mixer.gqa.head_dim=16",
    "mixer.nats_l={head_dim: 8, chunk: 16}",
)
JOB = Job(
    kind="train",
    dtype="fp32",
    device="cpu",
    threads=torch.get_num_threads(),
    malloc="default",
    repeats=1,
    length=24,
)


def tiny(*overrides: str) -> dict:
    return compose([*TINY, *overrides])


def settings(**changed) -> Settings:
    defaults = {
        "suite": "train",
        "lengths": [16, 24],
        "dtypes": ["fp32"],
        "repeats": 1,
        "peers": True,
        "peer_max_tokens": 16,
        "baselines": [],
        "mixers": [],
        "shares": [],
        "parts": ["softmax"],
        "masks": ["causal"],
        "schemes": ["ring"],
        "layouts": ["zigzag"],
        "histograms": [],
        "ranks": 2,
        "profile": False,
        "malloc": "default",
        "threads": None,
        "device": "cpu",
        "seed": 0,
        "timeout": 60,
        "patience": 0,
        "output": None,
    }
    return Settings(**{**defaults, **changed})


def finished(command: list[str], timeout: float) -> tuple[int, str, str]:
    """In the place of benchmarks.job._finished: python -m NAME ... in a process that is forked."""
    environment = {"OMP_NUM_THREADS": "1"}
    done = alone("tests.launchers", *command[2:], environment=environment, seconds=timeout)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "run", lambda self, timeout: worker.run(self))
