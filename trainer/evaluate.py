"""Evaluation tasks on a trained model."""

import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from parallel.mesh import Mesh
from trainer.agreement import check_agreement
from trainer.build import build_engine, build_model, build_ops, build_sharder
from trainer.checkpoint.weights import load_weights, open_weights
from trainer.construct import call
from trainer.data import StreamedData, build_data
from trainer.data.corpus import Split
from trainer.engine import Engine
from trainer.engine.ddp import DDPEngine
from trainer.errors import ConfigError, naming
from trainer.evals.build import benches, build_task
from trainer.evals.scoring import Scorer
from trainer.evals.suite import draw, joined
from trainer.evals.task import Bench, finite
from trainer.generation import generate
from trainer.load import tokenizer_of
from trainer.loss import LanguageModelLoss
from trainer.settings import Numerics, Parallelism, Settings

log = logging.getLogger(__name__)


def run_task(
    *,
    checkpoint: str,
    task: str,
    tasks: Mapping[str, Any],
    split: Split,
    output: str | None,
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    engine: Mapping[str, Any],
    parallel: Mapping[str, Any],
    ops: Mapping[str, Any],
    mesh: Mesh,
) -> dict[str, Any]:
    """-> the task's figures and, of a grid, its cells, over all ranks; leaves a picture in output/.

    The keywords are the keys of conf/evaluate.yaml. Raises ConfigError naming the key that is
    wrong.
    """
    made = build_task(task, tasks)
    settings: Settings = call(Settings, trainer, "trainer")
    parallelism: Parallelism = call(Parallelism, parallel, "parallel")
    tokenizer = data["tokenizer"] or tokenizer_of("checkpoint", checkpoint)
    plain = {**data, "tokenizer": tokenizer, "task": None, "options": None}
    documents = call(build_data, plain, "data")
    if isinstance(documents, StreamedData):
        raise ConfigError("data.streaming=true: evaluation reads a token store; allowed: false")
    config = {"task": task, "tasks": tasks[task], "split": split, "trainer": trainer}
    check_agreement(config | {"parallel": parallel}, documents.identity(), mesh)
    chosen = sum(len(corpus.documents(split)) for corpus in documents.corpora.values())
    if not chosen:
        raise ConfigError(f"split={split}: the source has no such document; allowed: all")
    log.info("%s: %d documents of data=%s, split %s", task, chosen, data["source"], split)
    loaded = load_engine(
        checkpoint,
        config={"engine": engine, "ops": ops},
        settings=settings,
        parallelism=parallelism,
        vocab_size=documents.tokenizer.vocab_size,
        mesh=mesh,
    )
    pad_id = documents.tokenizer.pad_id
    sharder = build_sharder([loaded.model], parallelism, mesh, pad_id=pad_id)
    bench = Bench(
        scorer=Scorer(loaded.evaluate, mesh=mesh, sharder=sharder),
        mesh=mesh,
        data=documents,
        micro_batch_size=settings.micro_batch_size,
        split=split,
        write=writer(loaded),
    )
    told: dict[str, Any] = {}
    for source, own in benches(task, made, bench).items():
        result = made.run(own)
        if output is not None and result.draw is not None and mesh.main:
            path = Path(output) / f"{joined(task, source)}.png"
            if draw(result, path):
                log.info("picture in %s", path)
        cells = {"cells": [finite(cell) for cell in result.cells]} if result.cells else {}
        figures = {**finite(result.figures), **cells}
        told |= {joined(source, name): value for name, value in figures.items()}
    return told


def load_engine(
    checkpoint: str,
    *,
    config: Mapping[str, Any],
    settings: Settings,
    parallelism: Parallelism,
    vocab_size: int,
    mesh: Mesh,
) -> Engine:
    """An engine with the weights of a checkpoint, a run folder, a native or a Hugging Face folder,
    for scoring alone.

    config: the sections engine and ops; vocab_size: the tokenizer's, which the model must hold.
    """
    numerics = Numerics.choose(settings.precision, mesh.device)
    path = Path(checkpoint)
    with naming("checkpoint", checkpoint):
        sections = open_weights(path).config
    ops = build_ops(config["ops"], mesh.device, numerics.products)
    model = build_model(sections["model"], sections["mixer"], vocab_size=vocab_size, ops=ops)
    blueprint = copy.deepcopy(model)
    loss = LanguageModelLoss(model, tile=settings.loss_tile, autocast=numerics.autocast)
    engine = build_engine(loss, {**config, "optim": IDLE}, settings, numerics, parallelism, mesh)
    with naming("checkpoint", checkpoint):
        load_weights(blueprint, path, assign=engine.assign)
    return engine


def writer(engine: Engine) -> Callable[..., Iterator[Tensor]] | None:
    """`trainer.generation.generate` on the engine's model; None where ranks share it, or its
    sequences."""
    if engine.mesh.context is not None or type(engine) is not DDPEngine:
        return None
    autocast, device = engine.numerics.autocast, engine.mesh.device

    def write(prompt: Tensor, **options: Any) -> Iterator[Tensor]:
        engine.model.eval()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield from generate(engine.model, prompt.to(device), **options)

    return write


# Takes no step and keeps no moments; engines want one.
IDLE = {"_target_": "trainer.optim.adamw", "lr": 1.0}


def trained_with(checkpoint: str) -> Mapping[str, Any]:
    """The configuration of the run that wrote a checkpoint or a run folder; empty for others."""
    path = Path(checkpoint) / "config.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def take_over(
    path: str, section: Mapping[str, Any], run: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
    """The section at `path` with the values of the run, but for the keys given, by full names."""
    taken = dict(section)
    for key, value in run.items():
        place = f"{path}.{key}"
        if isinstance(value, Mapping) and isinstance(section.get(key), Mapping):
            taken[key] = take_over(place, section[key], value, given)
        elif place not in given:
            taken[key] = value
    return taken
