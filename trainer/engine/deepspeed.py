"""ZeRO, arXiv 1910.02054, by DeepSpeed: ranks share the optimiser's state (stage 1), gradients too
(stage 2), parameters too (stage 3).

Parameters are fp32 and gradients are reduced in fp32 in every stage. bf16 is the loss module's own
autocast, as with every engine: DeepSpeed's would also send the gradients of linear layers in bf16.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.ops import __compatible_ops__ as compiled_ops
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.utils import groups
from torch import Tensor, nn

from parallel.mesh import Mesh
from trainer.engine import Engine, LossModule, Memory, State, clip
from trainer.engine.owned_state import OwnedState
from trainer.engine.partitions import Partitions
from trainer.errors import ConfigError
from trainer.settings import Numerics

Device = Literal["cpu"]


class PartitionedEngine(Engine):
    """config: DeepSpeed's own, of stage 1, 2 or 3; start: makes its engine of a module and an
    optimiser. Parameters of stage 3 are shared out unit by unit, so that no rank has them all.
    """

    def __init__(
        self,
        *,
        loss: LossModule,
        initialise: Callable[[nn.Module], None],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        mesh: Mesh,
        numerics: Numerics,
        config: dict[str, Any],
        start: Callable[[nn.Module, torch.optim.Optimizer], deepspeed.DeepSpeedEngine],
    ) -> None:
        stage = config["zero_optimization"]["stage"]
        prepare_process(mesh)
        groups.mpu = MeshUnit(mesh)

        def share(unit: nn.Module) -> None:
            initialise(unit)
            if stage == 3:
                deepspeed.zero.Init(module=unit, config_dict_or_path=config)

        def optimise(model: nn.Module) -> torch.optim.Optimizer:
            with _shapes(model):
                return optimizer(model)

        super().__init__(
            loss=loss, initialise=share, optimizer=optimise, mesh=mesh, numerics=numerics
        )
        self.gradient_factor = mesh.ranks if stage == 3 else mesh.data_ranks
        self.compiles = stage < 3
        self._deepspeed = start(loss, self.optimizer)
        if stage == 3:
            _forget_operations(loss)
        self._partitions = Partitions(self._deepspeed.optimizer)
        self._state = OwnedState(self.model, self._partitions, mesh)

    def accumulate(self, batch: Any, scale: float, *, last: bool) -> Tensor:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        entered = len(FWD_MODULE_STACK)
        loss = self._deepspeed(batch)
        self._deepspeed.backward(loss * (scale * self.gradient_factor), scale_wrt_gas=False)
        # Activation checkpointing leaves the last modules of a recomputation without ending them,
        # and must: it is their backward that asked for it, and still needs their parameters.
        del FWD_MODULE_STACK[entered:]
        return loss.detach()

    def clip_grad_norm(self, max_norm: float) -> float:
        return clip(self._partitions.gradients(), max_norm, self.mesh.group)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()

    def drop(self) -> None:
        """Takes the place of `step`: drops the gradients, which may not be finite, and changes
        nothing else."""
        self._partitions.drop_gradients()

    def memory(self) -> Memory:
        part = self._partitions.nbytes
        if self._partitions.sharded:
            return Memory(part, part, 2 * part)
        # A copy of the own part of the parameters beside its moments.
        return Memory(sum(p.nbytes for p in self.model.parameters()), part, 3 * part)

    def assign(self, name: str, value: Tensor) -> None:
        self._state.assign(name, value)

    def state(self) -> State:
        return self._state.gather()

    def load(self, fill: Callable[[State], None]) -> None:
        self._state.load(fill)


class ZeroEngine(PartitionedEngine):
    """bucket_mb: gradients per reduction; whole_below: elements, smaller parameters stay whole in
    stage 3 too; live_elements: how many it keeps whole rather than fetch them again.

    offload_optimizer: where the optimiser's state is and works; offload_parameters: where stage 3
    keeps parameters; each in place of the device. Raises ConfigError for fp64.
    """

    def __init__(
        self,
        *,
        loss: LossModule,
        initialise: Callable[[nn.Module], None],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        mesh: Mesh,
        numerics: Numerics,
        stage: Literal[1, 2, 3],
        bucket_mb: float = 25.0,
        offload_optimizer: Device | None = None,
        offload_parameters: Device | None = None,
        whole_below: int = 100_000,
        live_elements: int = 1_000_000_000,
    ) -> None:
        if numerics.precision == "fp64":
            raise ConfigError(
                f"engine=zero{stage}: DeepSpeed has no fp64; allowed: trainer.precision=fp32 or "
                "bf16, or engine=ddp or fsdp2"
            )
        if offload_parameters is not None and stage < 3:
            raise ValueError(
                f"offload_parameters is {offload_parameters}; allowed: null, as stage {stage} has "
                "parameters whole"
            )
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # ours to count
            "zero_force_ds_cpu_optimizer": False,  # which would be compiled first
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": max(int(bucket_mb * 2**20 / 4), 1),
                "stage3_param_persistence_threshold": whole_below,
                "stage3_max_live_parameters": live_elements,
                "stage3_max_reuse_distance": live_elements,
                **_offload(offload_optimizer=offload_optimizer, offload_param=offload_parameters),
            },
        }

        def start(module: nn.Module, optimizer: torch.optim.Optimizer) -> deepspeed.DeepSpeedEngine:
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, mpu=groups.mpu
            )
            return engine

        super().__init__(
            loss=loss,
            initialise=initialise,
            optimizer=optimizer,
            mesh=mesh,
            numerics=numerics,
            config=config,
            start=start,
        )


def _offload(**places: Device | None) -> dict[str, Any]:
    pinned = torch.cuda.is_available()
    return {
        part: {"device": place, "pin_memory": pinned}
        for part, place in places.items()
        if place is not None
    }


def prepare_process(mesh: Mesh) -> None:
    """What DeepSpeed expects of a process: an index of its device, and a group."""
    os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))
    # DeepSpeed calls these by names that are deprecated from torch 2.13 on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated")
    # It would compile a faster all-reduce in shared memory, into the user's home.
    compiled_ops["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def _shapes(model: nn.Module) -> Iterator[None]:
    """Gives parameters that are shared out the shape of the whole, though no memory: optimisers
    sort parameters by shape."""
    shared: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_shape")]
    emptied = [p.data for p in shared]
    for p in shared:
        p.data = p.data.new_empty(1).expand(p.ds_shape)
    yield
    for p, data in zip(shared, emptied, strict=True):
        p.data = data


def _forget_operations(loss: nn.Module) -> None:
    """Takes DeepSpeed's hooks away from modules without parameters.

    It holds ranks to the same order of calls, but ranks that share sequences call operations
    differently often; and a weight that is an argument of a hooked module stays whole from forward
    to backward.
    """
    for module in loss.modules():
        if next(module.parameters(), None) is None:
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()


class MeshUnit:
    """The mesh as DeepSpeed asks for it: its `mpu`, of ranks that share sequences.

    There is no group of data ranks alone: parameters, moments and gradients are shared out over
    all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def initialize_sequence_parallel(self) -> None:
        """Is there; that tells DeepSpeed what kind of mpu this is."""

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        return None if self._mesh.context is None else self._mesh.context.group

    def get_sequence_parallel_world_size(self) -> int:
        return self._mesh.context_ranks

    def get_sequence_parallel_rank(self) -> int:
        return self._mesh.rank % self._mesh.context_ranks

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._mesh.ranks

    def get_sequence_data_parallel_rank(self) -> int:
        return self._mesh.rank

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0
