"""What is measured: a training step of ours, of a peer's, or a mixer's two passes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.job import Config, Job
from models.hybrid import HybridLM, Layer
from models.mixer import Mixer
from models.sequence import SequenceInfo
from trainer.batch import Batch, Run
from trainer.build import build_model, build_ops
from trainer.checkpoint.weights import load_weights
from trainer.construct import construct
from trainer.data.tokenizer import ByteTokenizer
from trainer.loss import LanguageModelLoss
from trainer.settings import Numerics, Precision

VOCAB_SIZE = ByteTokenizer().vocab_size


@dataclass(frozen=True)
class Subject:
    step: Callable[[], Tensor]  # -> a loss, detached
    module: nn.Module


def make_model(config: Config, *, device: str = "meta", dtype: Precision = "fp32") -> HybridLM:
    """Not initialised; raises ConfigError."""
    device = "cpu" if device == "meta" else device
    ops = build_ops(config["ops"], device, Numerics(dtype).products)
    return build_model(config["model"], config["mixer"], vocab_size=VOCAB_SIZE, ops=ops)


def initialised_model(
    config: Config, *, seed: int, device: str, dtype: Precision = "fp32"
) -> HybridLM:
    model = make_model(config, device=device, dtype=dtype)
    torch.manual_seed(seed)
    model.to_empty(device=device)
    model.reset_parameters()
    return model


def train_step(job: Job) -> Subject:
    """Our model under our loss."""
    assert job.config is not None
    model = initialised_model(job.config, seed=job.seed, device=job.device, dtype=job.dtype)
    if job.weights is not None:
        load_weights(model, Path(job.weights))
    autocast = torch.bfloat16 if job.dtype == "bf16" else None
    loss, batch = LanguageModelLoss(model, autocast=autocast), random_batch(job).to(job.device)
    return _training(loss, lambda: loss(batch) / batch.valid_labels, job.config["optim"])


def transformers_step(job: Job) -> Subject:
    """The same weights in transformers, under its own loss, with its defaults."""
    from transformers import AutoModelForCausalLM

    assert job.config is not None and job.weights is not None
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.float32).train()
    nn.Module.to(model, job.device)
    tokens = random_batch(job).tokens.to(job.device)

    def loss() -> Tensor:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return _training(model, loss, job.config["optim"])


def _training(module: nn.Module, loss: Callable[[], Tensor], optim: dict[str, Any]) -> Subject:
    optimizer = construct(optim, "optim", model=module)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return Subject(step, module)


def mixer_pass(job: Job) -> Subject:
    """Forward and backward of the mixer of a model's first layer, [1, length, d_model]."""
    assert job.config is not None
    model = initialised_model(job.config, seed=job.seed, device=job.device, dtype=job.dtype)
    mixer = first_mixer(model)
    shape = (1, job.length, job.config["model"]["d_model"])
    x = torch.randn(shape, device=job.device, requires_grad=True)
    info = SequenceInfo.from_lengths([[job.length]], device=job.device)

    def step() -> Tensor:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            y = mixer(x, info)
        y.backward(y.detach())  # any gradient that is not constant
        mixer.zero_grad()
        x.grad = None
        return y.detach().float().square().mean()

    return Subject(step, mixer)


def first_mixer(model: HybridLM) -> Mixer:
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    return layer.mixer


def random_batch(job: Job) -> Batch:
    """One document of random bytes, drawn from the seed."""
    tokens = np.random.default_rng(job.seed).integers(0, 256, job.length)
    return Batch.from_rows([[Run(tokens)]], seq_len=job.length, pad_id=0)
