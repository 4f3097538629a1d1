"""Whatever `accelerate launch`, or its environment, configures: DDP, FSDP2 or DeepSpeed.

Accelerate says how ranks share the model, and nothing else: rows, ranks that share sequences,
accumulation, clipping, precision and checkpoints are as with every engine. Its environment is full
of settings that it drops without a word, so what it made of them is held to what the run needs.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from parallel.fsdp import copy_whole, local
from parallel.mesh import Mesh
from trainer.engine import Engine, LossModule, Memory, TokenScores, clip
from trainer.errors import ConfigError
from trainer.settings import Numerics

SHARED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


def accelerate(
    *,
    loss: LossModule,
    initialise: Callable[[nn.Module], None],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    mesh: Mesh,
    numerics: Numerics,
) -> Engine:
    """Raises ConfigError where Accelerate is configured to do what is not its part here, or did not
    do what it is configured to."""
    kind = _configured(mesh)
    _check_environment(kind, numerics)
    accelerator = _join(kind, mesh)
    _check_ranks(accelerator, kind, mesh)
    parts: dict[str, Any] = {
        "loss": loss,
        "initialise": initialise,
        "optimizer": optimizer,
        "mesh": mesh,
        "numerics": numerics,
    }
    if kind == DistributedType.DEEPSPEED:
        return _partitioned(accelerator, **parts)
    if kind == DistributedType.FSDP:
        return AcceleratedFSDP2(accelerator, **parts)
    return AcceleratedDDP(accelerator, **parts)


class AcceleratedDDP(Engine):
    """torch's DistributedDataParallel, whose buckets after its first step are not those before: a
    resumed run rounds otherwise than an uninterrupted one. A single process is left as it is."""

    def __init__(self, accelerator: Accelerator, **parts: Any) -> None:
        super().__init__(**parts)
        self._accelerator = accelerator
        self._wrapped, _ = accelerator.prepare(self.loss, self.optimizer)
        self.gradient_factor = self.mesh.ranks

    def accumulate(self, batch: Any, scale: float, *, last: bool) -> Tensor:
        apart = contextlib.nullcontext() if last else self._accelerator.no_sync(self._wrapped)
        with apart:
            loss = self._wrapped(batch)
            (loss * (scale * self.gradient_factor)).backward()
        return loss.detach()


class AcceleratedFSDP2(Engine):
    """torch's `fully_shard`, a unit a layer. Gradients are reduced in every micro-batch, so that
    they are in shards while they add up.

    Every rank holds the whole model, in fp32 or wider, until it is shared out.
    """

    def __init__(self, accelerator: Accelerator, **parts: Any) -> None:
        super().__init__(**parts)
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        layers = {type(layer).__name__ for layer in self.model.layers}
        plugin.transformer_cls_names_to_wrap = sorted(layers)
        plugin.cpu_ram_efficient_loading = False  # every rank has the initial values
        self.loss, _ = accelerator.prepare(self.loss, self.optimizer)
        self.gradient_factor = self.mesh.ranks

    def evaluate(self, batch: Any) -> TokenScores:
        scores = super().evaluate(batch)
        cast(FSDPModule, self.loss).reshard()  # as a backward pass would have done
        return scores

    def clip_grad_norm(self, max_norm: float) -> float:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        mesh = gradients[0].device_mesh
        shards = mesh.get_group(mesh.ndim - 1)  # with copies across, if there are any
        return clip([local(x) for x in gradients], max_norm, shards)

    def memory(self) -> Memory:
        return Memory.of_adamw(local(p) for p in self.model.parameters())

    def assign(self, name: str, value: Tensor) -> None:
        target = self.model.state_dict()[name]
        copy_whole(target, value.to(target))


def _partitioned(accelerator: Accelerator, *, mesh: Mesh, **parts: Any) -> Engine:
    from trainer.engine.deepspeed import PartitionedEngine

    config = accelerator.deepspeed_plugin.deepspeed_config
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # ours to count
        "gradient_accumulation_steps": 1,
        "train_batch_size": mesh.ranks,
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled first
    }
    return PartitionedEngine(
        mesh=mesh,
        config=config,
        start=lambda *prepared: accelerator.prepare(*prepared)[0],
        **parts,
    )


def _configured(mesh: Mesh) -> DistributedType:
    """What the environment asks for."""
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return DistributedType.DEEPSPEED
    if _is_on("ACCELERATE_USE_FSDP"):
        return DistributedType.FSDP
    if mesh.group is None:
        return DistributedType.NO
    return DistributedType.MULTI_GPU if mesh.device.type == "cuda" else DistributedType.MULTI_CPU


def _check_environment(kind: DistributedType, numerics: Numerics) -> None:
    """Refuses what the environment asks of Accelerate and is ours to do."""
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed not in ("no", numerics.precision):
        raise ConfigError(
            f"trainer.precision={numerics.precision}: accelerate is configured for {mixed}; "
            "allowed: the same here and there, or accelerate's mixed_precision=no"
        )
    if kind == DistributedType.DEEPSPEED and numerics.precision == "fp64":
        raise ConfigError("trainer.precision=fp64: DeepSpeed has none; allowed: fp32, bf16")
    refused = {
        "ACCELERATE_USE_CPU": (kind in SHARED, f"drops {kind.value}"),
        "ACCELERATE_USE_MEGATRON_LM": (True, "is another trainer"),
        "FSDP_ACTIVATION_CHECKPOINTING": (True, "is trainer.activation_checkpointing here"),
    }
    for variable, (matters, reason) in refused.items():
        if matters and _is_on(variable):
            raise ConfigError(f"{variable}=true: {reason}; allowed: false")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _join(kind: DistributedType, mesh: Mesh) -> Accelerator:
    """Finds the process group that the mesh made."""
    # Accelerate imports DeepSpeed with others too; on CPU that would say that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    if kind == DistributedType.DEEPSPEED:
        from trainer.engine.deepspeed import prepare_process

        prepare_process(mesh)
    if mesh.device.type == "cpu" and kind in SHARED:
        # With cpu=True Accelerate drops both and trains by DDP; without it, and without a GPU, it
        # takes every rank for a single process. Told the backend, it counts the ranks, but for FSDP
        # it still wants to have found GPUs.
        found = PartialState(backend="gloo")
        if found.distributed_type == DistributedType.NO:
            found.distributed_type = DistributedType.MULTI_GPU
    return Accelerator(
        cpu=kind == DistributedType.MULTI_CPU,
        mixed_precision="no",  # the loss module's own
        # Buffers count the experts' tokens of this rank.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _check_ranks(accelerator: Accelerator, kind: DistributedType, mesh: Mesh) -> None:
    """Holds what Accelerate made of its environment to what the run believes."""
    state, parallelism = accelerator.state, accelerator.parallelism_config
    sequence_ranks = 1 if parallelism is None else parallelism.cp_size * parallelism.sp_size
    believed = {
        "distributed_type": (accelerator.distributed_type, kind),
        "num_processes": (accelerator.num_processes, mesh.ranks),
        "process_index": (accelerator.process_index, mesh.rank),
        "device": (accelerator.device.type, mesh.device.type),
        "mixed_precision": (accelerator.mixed_precision, "no"),
        "dynamo_backend": (state.dynamo_plugin.backend, DynamoBackend.NO),
        "cp_size x sp_size": (sequence_ranks, 1),  # they would cut sequences that are cut already
        "tp_size": (1 if parallelism is None else parallelism.tp_size, 1),
    }
    if kind == DistributedType.FSDP:
        believed["fsdp_version"] = (state.fsdp_plugin.fsdp_version, 2)
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.deepspeed_plugin.zero_stage
        believed["zero_stage"] = (stage, stage if stage in (1, 2, 3) else "1, 2 or 3")
    for name, (found, expected) in believed.items():
        if found != expected:
            raise ConfigError(f"engine=accelerate: {name}={found}; allowed: {expected}")
