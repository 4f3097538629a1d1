"""Context parallelism over CUDA kernels: gradients of a model in bf16 against fp64.

The ranks of a test share one device, which NCCL gives to one rank only. So messages go through the
host, and all but NCCL is tested. The budget is twice the error that the same kernels make on one
rank.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.hybrid import HybridLM
from models.ops.select import Ops
from parallel.collectives import Axis, Pending, sum_over_ranks
from parallel.mesh import Mesh
from tests.gpu.test_ops import DELTA_RULES
from tests.models.build import REFERENCE, compose, randomise
from tests.parallel.ranks import on_ranks
from tests.parallel.test_softmax_schemes import two_axes
from trainer.batch import Batch, Run
from trainer.build import build_model, build_sharder, share_sequences
from trainer.construct import call
from trainer.loss import LanguageModelLoss
from trainer.settings import Parallelism

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
MODEL = [
    "model.pattern=[kda,mla,gqa]",
    "model.num_layers=3",
    "model.d_model=128",
    "model.ffn.hidden=128",
    "model.moe=null",  # which experts a token takes differs between precisions
    "mixer.gqa.qk_norm=true",
]
DOCUMENTS = [[700, 130, 64, 1, 105]]
LAYOUTS = ["balanced", "zigzag"]


class HostAxis(Axis):
    """The same messages, sent from host memory."""

    def exchange(self, x: Tensor, *args, **facts) -> Any:
        return Returning(super().exchange(x.cpu(), *args, **facts), x.device)

    def shift(self, x: Tensor, *args, **facts) -> Any:
        return Returning(super().shift(x.cpu(), *args, **facts), x.device)

    def gather(self, x: Tensor, **facts) -> Any:
        return Returning(super().gather(x.cpu(), **facts), x.device)

    def sum_scatter(self, x: Tensor, **facts) -> Any:
        return Returning(super().sum_scatter(x.cpu(), **facts), x.device)


class Returning:
    def __init__(self, pending: Pending, device: torch.device) -> None:
        self.pending, self.device = pending, device

    def wait(self) -> Tensor:
        return self.pending.wait().to(self.device)


@pytest.mark.parametrize("delta_rule", DELTA_RULES)
def test_two_ranks_equal_one(delta_rule):
    variants = [
        compose([*MODEL, f"parallel={scheme}", f"parallel.layout={layout}"])
        for scheme in ("ring", "gather", "ulysses")
        for layout in LAYOUTS
    ]
    on_ranks(2, check, variants, delta_rule, 1, seconds=280)


def test_two_levels_equal_one():
    outer = [
        ["parallel=usp", "parallel.ulysses=2", f"parallel.outer={o}"] for o in ("ring", "gather")
    ]
    on_ranks(4, check, [compose([*MODEL, *more]) for more in outer], "auto", 2, seconds=280)


def check(axis: Axis, variants: list[dict[str, Any]], delta_rule: str, ulysses: int) -> None:
    whole = HostAxis(axis.group, axis.rank, axis.ranks, axis.traffic)
    inner, outer = two_axes(whole, ulysses)
    mesh = Mesh(device=DEVICE, context=whole, ulysses=inner, ring=outer)
    ops = Ops(delta_rule=delta_rule, device=DEVICE, dtype=torch.bfloat16)
    batch, sections = packed(), variants[0]
    truth = gradients(LanguageModelLoss(model(sections, REFERENCE).double()), batch)
    alone = gradients(bf16(model(sections, ops)), batch)
    budget = {name: 2 * distance(alone, truth, name) for name in truth}
    assert max(budget.values()) < 0.2
    failed = []
    for config in variants:
        parallelism = call(Parallelism, config["parallel"], "parallel")
        shared = model(config, ops)
        share_sequences(shared, parallelism, mesh)
        sharder = build_sharder([shared], parallelism, mesh, pad_id=257)
        assert sharder is not None
        got = gradients(bf16(shared), sharder(batch))
        got = {name: sum_over_ranks(x.cpu(), axis.group).to(DEVICE) for name, x in got.items()}
        errors = {name: distance(got, truth, name) for name in budget}
        over = {name: (x, budget[name]) for name, x in errors.items() if not x <= budget[name]}
        failed += [(config["parallel"], over)] if over else []
    assert not failed, failed


def packed() -> Batch:
    draw = np.random.default_rng(0)
    rows = [[Run(draw.integers(0, 256, length)) for length in row] for row in DOCUMENTS]
    return Batch.from_rows(rows, seq_len=1024, pad_id=257)


def model(config: dict[str, Any], ops: Ops) -> HybridLM:
    sections = config["model"], config["mixer"]
    return randomise(build_model(*sections, vocab_size=320, ops=ops, device="cpu")).to(DEVICE)


def bf16(model: HybridLM) -> LanguageModelLoss:
    return LanguageModelLoss(model, autocast=torch.bfloat16)


def gradients(loss: LanguageModelLoss, batch: Batch) -> dict[str, Tensor]:
    """Of each layer, the embedding and the head, all parameters in one; in fp64."""
    loss(batch.to(DEVICE)).backward()
    found: dict[str, list[Tensor]] = {}
    for name, parameter in loss.model.named_parameters():
        assert parameter.grad is not None, name
        unit = ".".join(name.split(".")[:2])
        found.setdefault(unit, []).append(parameter.grad.flatten())
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def distance(got: dict[str, Tensor], truth: dict[str, Tensor], name: str) -> float:
    return float((got[name] - truth[name]).norm() / truth[name].norm())
