"""Run by torchrun: does training jobs one after the other and keeps what only a rank can see.

JOBS is a JSON list with the overrides of each job; rank r leaves run_dir/seen_r.pt, see `watch`.
"""

import gc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import gather_objects
from parallel.fsdp import local
from tests.models.build import compose
from trainer import main as commands
from trainer.build import build_trainer
from trainer.loop import Trainer


def watch(trainer: Trainer) -> dict[str, Any]:
    """Filled while the trainer takes its first two steps.

    gradients: name -> whole gradient of the first step; bytes: what parameters, gradients and
    optimiser hold on this rank in the second, before its update; alive: what all tensors hold then,
    those of earlier jobs too; memory: what the engine says; dtypes: name -> dtype of the parameters
    that a layer sees while it computes.
    """
    engine = trainer.engine
    seen: dict[str, Any] = {"dtypes": {}, "memory": tuple(engine.memory())}
    clip = engine.clip_grad_norm

    def watched(max_norm: float) -> float:
        parameters = dict(engine.model.named_parameters())
        if "gradients" not in seen:
            seen["gradients"] = whole({name: p.grad for name, p in parameters.items()}, trainer)
        else:
            state = engine.optimizer.state.values()
            moments = [x for s in state for name, x in s.items() if name != "step"]
            seen["bytes"] = {
                "parameters": held(parameters.values()),
                "gradients": held(p.grad for p in parameters.values()),
                "optimizer": held(moments),
            }
            seen["alive"] = held(tensors_alive()) - held(seen["gradients"].values())
            engine.clip_grad_norm = clip
        return clip(max_norm)

    def look(prefix: str, layer: nn.Module) -> None:
        seen["dtypes"] |= {name: p.dtype for name, p in layer.named_parameters(prefix)}

    engine.clip_grad_norm = watched
    for i, layer in enumerate(engine.model.layers):
        layer.ffn.register_forward_pre_hook(lambda *_, i=i, layer=layer: look(f"{i}", layer))
    return seen


def whole(tensors: dict[str, Tensor], trainer: Trainer) -> dict[str, Tensor]:
    """By objects, as a DTensor's own messages look for the groups of the job before this one."""
    ranks = gather_objects(
        {name: local(x).clone() for name, x in tensors.items()}, trainer.mesh.group
    )
    shards = {name: shard_ranks(x) for name, x in tensors.items()}
    return {name: torch.cat([part[name] for part in ranks[:n]]) for name, n in shards.items()}


def shard_ranks(x: Tensor) -> int:
    """How many ranks, the first and its neighbours, hold this tensor together."""
    return x.device_mesh.shape[-1] if isinstance(x, DTensor) else 1


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of all that these keep in memory, views of one storage counted once."""
    storages = [local(x).untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_alive() -> list[Tensor]:
    """But for what compilers reason with, which has no memory."""
    kinds = (Tensor, nn.Parameter, nn.Buffer, DTensor)
    alive = [x for x in gc.get_objects() if type(x) in kinds]
    return alive + [x.grad for x in alive if x.is_leaf and x.grad is not None]


def main(jobs: Path) -> None:
    seen: list[dict[str, Any]] = []

    def build_watched(*args: Any, **kwargs: Any) -> Trainer:
        trainer = build_trainer(*args, **kwargs)
        seen.append(watch(trainer))
        return trainer

    commands.build_trainer = build_watched
    for overrides in json.loads(jobs.read_text()):
        config = compose(overrides)
        commands.train(config)
        torch.save(seen.pop(), Path(config["run_dir"], f"seen_{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the threads of a process group can abort a process that Python winds up
