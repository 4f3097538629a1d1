"""One way to keep activations for the backward pass: its memory, its time, and how wrong it makes
each gradient."""

import math
import statistics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.job import Job, Result
from benchmarks.measure import kept_bytes, measure
from benchmarks.subjects import initialised_model
from parallel.activation_checkpoint import apply_activation_checkpointing
from parallel.activation_storage import apply_activation_storage
from parallel.offload import Offload
from trainer.activations import ROUNDED
from trainer.batch import Batch, Run
from trainer.construct import construct
from trainer.loss import LanguageModelLoss
from trainer.settings import ActivationStorage

FILES = 20  # half a megabyte of text
WARM_STEPS = 8  # of the reference: gates, decays and routers are not as they were drawn


@dataclass(frozen=True, kw_only=True)
class Case:
    storage: ActivationStorage | None  # None: trains for some steps and writes the reference
    checkpointing: bool
    offload: bool
    reference: str  # a file with weights, and the gradients that they have when all is kept


def measure_saved(job: Job) -> Result:
    """What `measure` gives of forward and backward, and kept_bytes that the forward leaves behind;
    error of the gradient as a whole, median_error and largest_error of a parameter's, and whose."""
    assert job.case is not None
    case = Case(**job.case)
    step = Step(job)
    if case.storage is None:
        step.train(WARM_STEPS)
        step()
        weights = step.loss.model.state_dict()
        torch.save({"weights": weights, "gradients": step.gradients()}, case.reference)
        return {}
    reference = torch.load(case.reference, mmap=True)
    step.loss.model.load_state_dict(reference["weights"])
    store(step, case)
    result = measure(step, repeats=job.repeats, device=torch.device(job.device))
    result["kept_bytes"] = kept_bytes(step.forward)[1]
    return result | errors(step.gradients(), reference["gradients"])


def store(step: "Step", case: Case) -> None:
    assert case.storage is not None
    layers = step.loss.model.layers
    if case.checkpointing:
        apply_activation_checkpointing(layers)
    apply_activation_storage(
        layers,
        rounding=None if case.storage == "exact" else case.storage,
        rounded=None if case.checkpointing else ROUNDED,
        offload=Offload(step.device) if case.offload else None,
    )


class Step:
    """Forward and backward of a model on a row of text, from the same weights each time."""

    def __init__(self, job: Job) -> None:
        assert job.config is not None
        self.device, self.optim = torch.device(job.device), job.config["optim"]
        model = initialised_model(job.config, seed=job.seed, device=job.device, dtype=job.dtype)
        autocast = torch.bfloat16 if job.dtype == "bf16" else None
        self.loss = LanguageModelLoss(model, autocast=autocast)
        self.rows = texts(job.length)
        self.batch = next(self.rows).to(self.device)

    def __call__(self) -> Tensor:
        self.loss.zero_grad()
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def forward(self) -> Tensor:
        return self.loss(self.batch) / self.batch.valid_labels

    def train(self, steps: int) -> None:
        optimizer = construct(self.optim, "optim", model=self.loss.model)
        kept = self.batch
        for batch in islice(self.rows, steps):
            self.batch = batch.to(self.device)
            self()
            optimizer.step()
        self.batch = kept

    def gradients(self) -> dict[str, Tensor]:
        named = self.loss.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


def texts(length: int) -> Iterator[Batch]:
    """One document a row: the source of Python's standard library, over and over."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokens = np.concatenate([np.fromfile(file, np.uint8) for file in files[:FILES]])
    for start in count(step=length):
        run = Run(np.take(tokens, range(start, start + length), mode="wrap").astype(np.int64))
        yield Batch.from_rows([[run]], seq_len=length, pad_id=0)


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> Result:
    """Norms of differences over norms; a parameter without a gradient has none."""
    wrong = {name: float((got[name].cpu() - x).norm()) for name, x in expected.items()}
    norms = {name: float(x.norm()) for name, x in expected.items()}
    relative = {name: wrong[name] / norm for name, norm in norms.items() if norm}
    worst = max(relative, key=relative.__getitem__)
    return {
        "error": math.hypot(*wrong.values()) / math.hypot(*norms.values()),
        "median_error": statistics.median(relative.values()),
        "largest_error": relative[worst],
        "worst": worst,
    }
