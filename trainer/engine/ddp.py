"""Data parallelism: every rank holds the whole model, gradients are summed over the ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.gradients import GradientReducer
from parallel.mesh import Mesh
from trainer.engine import Engine, LossModule
from trainer.settings import Numerics


class DDPEngine(Engine):
    """Without a process group, a single process."""

    def __init__(
        self,
        *,
        loss: LossModule,
        initialise: Callable[[nn.Module], None],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        mesh: Mesh,
        numerics: Numerics,
        bucket_mb: float = 25.0,
    ) -> None:
        super().__init__(
            loss=loss, initialise=initialise, optimizer=optimizer, mesh=mesh, numerics=numerics
        )
        self._reducer = None
        if mesh.group is not None:
            trained = (p for p in self.model.parameters() if p.requires_grad)
            self._reducer = GradientReducer(trained, mesh.group, bucket_mb=bucket_mb)
        self._first = True

    def accumulate(self, batch: Any, scale: float, *, last: bool) -> Tensor:
        if self._reducer is None:
            return super().accumulate(batch, scale, last=last)
        if self._first:
            self._reducer.open()
        if last:
            self._reducer.sum_next()
        loss = super().accumulate(batch, scale, last=last)
        if last:
            self._reducer.finish()
        self._first = last
        return loss
