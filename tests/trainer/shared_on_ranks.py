"""Run on ranks: does training jobs one after the other and keeps what only a rank can see.

JOBS is a JSON list of {"config": a resolved configuration, "rank N": that of rank N, if another,
"environment": what that job has beside ours, "marks": a list}. Marked `unsaved`, a job writes no
checkpoint; `undrawn`, no pictures; `counted`, it counts all tensors; `dropped`, it has a step
before the second whose gradients are not finite and are dropped.
Rank r leaves run_dir/seen_r.pt, see `watch`, unless the job is refused, which it prints.
"""

import gc
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import gather_objects
from trainer import main as commands
from trainer.batch import Batch
from trainer.build import build_trainer
from trainer.errors import ConfigError
from trainer.evals import suite
from trainer.loop import Trainer

VOCABULARY = 257  # bytes, and the end of a document


def watch(trainer: Trainer, before: int | None = None) -> dict[str, Any]:
    """Filled while the trainer takes steps, before each update.

    read: [steps, vocabulary], how often this rank was given each token in each step; gradients:
    name -> whole gradient of the first step, not clipped; alive: what all tensors hold in the
    second beside the gradients kept and the `before` bytes that were there; between: the same
    behind a micro-batch before the last; bytes: what parameters, gradients and optimiser hold on
    this rank in the last step; memory: what the engine says of that; dtypes: name -> dtype of the
    parameters that a layer sees while it computes.
    """
    engine = trainer.engine
    seen: dict[str, Any] = {"read": [], "dtypes": {}, "memory": tuple(engine.memory())}
    clip, accumulate = engine.clip_grad_norm, engine.accumulate
    read: list[Tensor] = []

    def accumulated(batch: Batch, *args: Any, last: bool) -> Tensor:
        read.append(batch.tokens[batch.info.valid].bincount(minlength=VOCABULARY))
        if last:
            seen["read"].append(sum(read))
            read.clear()
        loss = accumulate(batch, *args, last=last)
        if before is not None and "gradients" in seen and not last:
            seen["between"] = alive() - held(seen["gradients"].values()) - before
        return loss

    def watched(max_norm: float) -> float:
        seen["bytes"] = bytes_of(engine)
        if "gradients" not in seen:
            seen["gradients"] = whole_gradients(trainer)
        elif before is not None and "alive" not in seen:
            seen["alive"] = alive() - held(seen["gradients"].values()) - before
        return clip(max_norm)

    def look(prefix: str, layer: nn.Module) -> None:
        seen["dtypes"] |= {name: p.dtype for name, p in layer.named_parameters(prefix)}

    engine.accumulate = accumulated
    engine.clip_grad_norm = watched
    for i, layer in enumerate(engine.model.layers):
        layer.ffn.register_forward_pre_hook(lambda *_, i=i, layer=layer: look(f"{i}", layer))
    return seen


def whole_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Shards come by objects: a DTensor's own messages may look for groups that are gone."""
    named = trainer.engine.model.named_parameters()
    parameters: dict[str, Any] = {name: p for name, p in named if p.requires_grad}
    shards = {n: p.grad.to_local() for n, p in parameters.items() if isinstance(p.grad, DTensor)}
    ranks = gather_objects(shards, trainer.mesh.group)
    return {
        name: torch.cat([part[name] for part in ranks[: p.grad.device_mesh.shape[-1]]])
        if name in shards
        else full_gradient(p)
        for name, p in parameters.items()
    }


def full_gradient(parameter: Any) -> Tensor:
    if parameter.grad is not None:
        return parameter.grad.clone()
    from deepspeed.utils import safe_get_full_grad  # which this process has set up by now

    return safe_get_full_grad(parameter)


def bytes_of(engine: Any) -> dict[str, int]:
    parameters = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]
    partitions = getattr(engine, "_partitions", None)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    gradients = partitions.gradients() if partitions else [p.grad for p in trained]
    state = engine.optimizer.state
    masters = [key for key in state if partitions]
    moments = [x for values in state.values() for name, x in values.items() if name != "step"]
    weights = held(parameters)
    return {
        "parameters": weights,
        "gradients": held(gradients),
        "optimizer": held([*parameters, *masters, *moments]) - weights,
    }


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of all that these keep in memory, views of one storage counted once."""
    local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    storages = [x.untyped_storage() for x in local]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def alive() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return held([*tensors, *(x.grad for x in tensors if x.is_leaf and x.grad is not None)])


def drop_a_step(trainer: Trainer) -> None:
    """Before the second step of the run."""
    engine, step = trainer.engine, trainer.engine.step

    def stepped(lr: float) -> None:
        step(lr)
        engine.step = step
        counts = [router.counts.clone() for router in engine.model.routers()]
        batches = trainer._ahead.result().batches
        for i, batch in enumerate(batches):
            engine.accumulate(batch, math.nan, last=i == len(batches) - 1)
        assert math.isnan(engine.clip_grad_norm(1.0))
        engine.drop()
        for router, own in zip(engine.model.routers(), counts, strict=True):
            router.counts.copy_(own)

    engine.step = stepped


def main(jobs: str) -> None:
    environment = dict(os.environ)
    marks: list[str] = []
    seen: list[dict[str, Any]] = []
    draw = suite.draw
    gc.freeze()  # what was imported need not be looked through again

    def build_watched(*args: Any, **kwargs: Any) -> Trainer:
        before = alive() if "counted" in marks else None
        trainer = build_trainer(*args, **kwargs)
        seen.append(watch(trainer, before))
        if "dropped" in marks:
            drop_a_step(trainer)
        if "unsaved" in marks:
            trainer.save = lambda **facts: None
        suite.draw = draw if "undrawn" not in marks else lambda result, path: False
        return trainer

    commands.build_trainer = build_watched
    for job in json.loads(Path(jobs).read_text()):
        os.environ.clear()
        os.environ |= environment | job["environment"]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        marks[:] = job["marks"]
        config = job.get(f"rank {os.environ['RANK']}", job["config"])
        try:
            commands.train(config)
        except ConfigError as error:
            print(f"refused: {error}\n", end="", flush=True)  # in one piece
        else:
            file = Path(config["run_dir"], f"seen_{os.environ['RANK']}.pt")
            torch.save(seen.pop(), file)
