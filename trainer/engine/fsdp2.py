"""Fully sharded data parallelism, arXiv 2304.11277, by torch's `fully_shard`.

Parameters, gradients and optimiser state are divided among all ranks, those of a context group
too, or among groups of neighbours that hold a copy each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parallel.fsdp import Sharding, copy_whole, local
from parallel.mesh import Mesh
from trainer.engine import Engine, LossModule, Memory, TokenScores, clip
from trainer.settings import Numerics


class FSDP2Engine(Engine):
    """Without a process group, a single process with everything whole.

    shard_ranks: neighbours that hold a copy of the model together; None for all ranks of the run.
    reshard_after_forward: False keeps layers whole up to their backward pass.
    reduce_every_micro_batch: False sends gradients once a step, and holds them whole until then.
    cpu_offload: shards, gradients and optimiser stay in host memory; CUDA only.
    """

    def __init__(
        self,
        *,
        loss: LossModule,
        initialise: Callable[[nn.Module], None],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        mesh: Mesh,
        numerics: Numerics,
        shard_ranks: int | None = None,
        reshard_after_forward: bool = True,
        reduce_every_micro_batch: bool = True,
        cpu_offload: bool = False,
    ) -> None:
        shards = mesh.ranks if shard_ranks is None else shard_ranks
        if shards < 1 or mesh.ranks % shards:
            raise ValueError(
                f"shard_ranks is {shards}; allowed: a divisor of the run's {mesh.ranks} ranks"
            )
        if cpu_offload and (mesh.device.type != "cuda" or mesh.group is None):
            raise ValueError("cpu_offload is true; allowed: false, or CUDA under torchrun")
        self._sharding = None
        if mesh.group is not None:
            self._sharding = Sharding(
                mesh,
                shard_ranks=shards,
                products=numerics.autocast,
                reshard_after_forward=reshard_after_forward,
                cpu_offload=cpu_offload,
            )
        self._reduce_every = reduce_every_micro_batch
        super().__init__(
            loss=loss, initialise=initialise, optimizer=optimizer, mesh=mesh, numerics=numerics
        )

    def _materialise(self, initialise: Callable[[nn.Module], None]) -> None:
        """At any time one layer is whole, beside the embedding and the head."""
        for unit in self.model.units():
            initialise(unit)
            if self._sharding is not None and unit in [*self.model.layers]:
                self._sharding.layer(unit)
        if self._sharding is not None:
            self._sharding.root(self.loss)

    def accumulate(self, batch: Any, scale: float, *, last: bool) -> Tensor:
        if self._sharding is not None:
            self._sharding.reduce_next(last or self._reduce_every, copies=last)
        return super().accumulate(batch, scale, last=last)

    def evaluate(self, batch: Any) -> TokenScores:
        scores = super().evaluate(batch)
        if self._sharding is not None:
            self._sharding.free()
        return scores

    def clip_grad_norm(self, max_norm: float) -> float:
        if self._sharding is None:
            return super().clip_grad_norm(max_norm)
        grads = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        return clip(grads, max_norm, self._sharding.group)

    def memory(self) -> Memory:
        return Memory.of_adamw(local(p) for p in self.model.parameters())

    def assign(self, name: str, value: Tensor) -> None:
        copy_whole(self.model.state_dict()[name], value)
