"""Time goes to the part that spent it, in the backward as in the forward."""

import dataclasses
import time

import torch
from torch import nn

from benchmarks.profile import OPTIMISER, PARTS, PROJECTIONS, REST, profile
from benchmarks.subjects import train_step
from models.sequence import CausalConv, LinearRecurrence
from tests.benchmarks.conftest import JOB, tiny

CPU = torch.device("cpu")
PAUSE = 0.05


class _Pause(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.backward_seconds)
        return grad, None, None


class _Conv(CausalConv):
    def forward(self, x, weight=None, info=None, *, history=None):
        return _Pause.apply(x, PAUSE, 0)


class _Recurrence(LinearRecurrence):
    def forward(self, x):
        return _Pause.apply(x, 0, PAUSE) + 1


class _Outer(LinearRecurrence):
    """A part inside a part keeps its own time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Conv()

    def forward(self, x):
        return self.inner(x).sin()


def test_pauses_are_found_where_they_are() -> None:
    module = nn.Sequential(_Outer(), _Recurrence())
    x = torch.ones(3, requires_grad=True)
    parts = profile(lambda: module(x).sum().backward(), module, device=CPU)
    conv, recurrence = parts["convolution"], parts["recurrence core"]
    assert conv["forward"] >= PAUSE > recurrence["forward"]
    assert recurrence["backward"] >= PAUSE > conv["backward"]
    assert "forward" not in vars(module[0]), "the hooks are gone"


def test_every_part_of_a_model_is_there() -> None:
    subject = train_step(dataclasses.replace(JOB, config=tiny()))
    subject.step()
    parts = profile(subject.step, subject.module, device=CPU)
    assert set(parts) == {name for _, name in PARTS} | {PROJECTIONS, OPTIMISER, REST}
    for part in {name for _, name in PARTS} | {PROJECTIONS}:
        assert parts[part]["backward"] > 0, part
    assert parts[OPTIMISER]["backward"] == 0
