"""Run on ranks: see test_gradients.py. Writes what each rank saw."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from parallel import collectives, gradients
from parallel.mesh import join, leave
from trainer.engine import Engine, LossModule, verify_gradient_factor
from trainer.engine.ddp import DDPEngine
from trainer.settings import Numerics


class Model(nn.Module):
    """Parameters that are reached twice, on some ranks only, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.tied = nn.Parameter(torch.randn(4, 4))
        self.sometimes = nn.Parameter(torch.randn(4))
        self.never = nn.Parameter(torch.randn(5))
        self.last = nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.layers = nn.ModuleList()

    def units(self):
        return [self]


class Loss(LossModule):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        x, reached = batch
        x = self.model.first(x) @ self.model.tied @ self.model.tied
        if reached:
            x = x * self.model.sometimes
        return self.model.last(x).square().sum()


def batch(rank: int, micro: int):
    generator = torch.Generator().manual_seed(10 * rank + micro)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64), (rank + micro) % 2 == 1


def main(folder: str) -> None:
    mesh = join(timeout_minutes=1)
    sent: list[int] = []
    start = collectives.start_sum

    def watched(x, group):
        sent.append(x.numel())
        return start(x, group)

    gradients.start_sum = watched
    torch.manual_seed(0)
    loss = Loss(Model().double())
    model, numerics = loss.model, Numerics("fp64")
    engine = DDPEngine(
        loss=loss,
        initialise=lambda unit: None,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        mesh=mesh,
        numerics=numerics,
        bucket_mb=40 / 2**20,
    )
    seen: dict = {"losses": [], "sent": [], "grads": [], "norms": [], "kept": []}
    for _step in range(2):  # the second from parameters that a step has changed
        for micro in range(3):
            seen["losses"].append(engine.accumulate(batch(mesh.rank, micro), 0.5, last=micro == 2))
            seen["sent"].append(list(sent))
            sent.clear()
        seen["grads"].append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        seen["norms"].append(engine.clip_grad_norm(1.0))
        engine.step(0.1)
        seen["kept"].append([p.grad is not None for p in model.parameters()])
    seen["end"] = model.state_dict()

    verify_gradient_factor(partial(DDPEngine, numerics=numerics), mesh)
    try:
        verify_gradient_factor(partial(Engine, numerics=numerics), mesh)  # reduces nothing
    except RuntimeError as error:
        seen["probe"] = str(error)
    torch.save(seen, Path(folder, f"rank{dist.get_rank()}.pt"))
    leave(mesh)
