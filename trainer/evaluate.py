"""Evaluation tasks on a trained model."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from parallel.mesh import Mesh
from trainer.agreement import check_agreement
from trainer.batch import Batch
from trainer.build import build_ops, build_sharder, share_sequences
from trainer.construct import call
from trainer.data import build_data
from trainer.errors import ConfigError
from trainer.evals import perplexity
from trainer.load import load_model, tokenizer_of
from trainer.loss import LanguageModelLoss
from trainer.settings import Numerics, Parallelism, Settings

TASKS: dict[str, Callable[..., dict[str, float | None]]] = {"perplexity": perplexity.run}

log = logging.getLogger(__name__)


def run_task(
    *,
    checkpoint: str,
    task: str,
    split: Literal["all", "eval", "train"],
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    parallel: Mapping[str, Any],
    ops: Mapping[str, Any],
    mesh: Mesh,
) -> dict[str, float | None]:
    """-> the task's figures, over all ranks; the keywords are the keys of conf/evaluate.yaml.

    Raises ConfigError naming the key that is wrong.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task}: allowed: {', '.join(TASKS)}")
    settings: Settings = call(Settings, trainer, "trainer")
    parallelism: Parallelism = call(Parallelism, parallel, "parallel")
    numerics = Numerics.choose(settings.precision, mesh.device)
    tokenizer = data["tokenizer"] or tokenizer_of(checkpoint)
    documents = call(build_data, {**data, "tokenizer": tokenizer}, "data")
    config = {"task": task, "split": split, "trainer": trainer, "parallel": parallel}
    check_agreement(config, documents.identity(), mesh)
    model = load_model(
        checkpoint,
        ops=build_ops(ops, mesh.device, numerics.products),
        device=mesh.device,
        dtype=numerics.parameters,
        vocab_size=documents.tokenizer.vocab_size,
    )
    chosen = sum(len(corpus.documents(split)) for corpus in documents.corpora)
    if not chosen:
        raise ConfigError(f"split={split}: the source has no such document; allowed: all")
    log.info("%s: %d documents of data=%s, split %s", task, chosen, data["source"], split)
    share_sequences(model, parallelism, mesh)
    batches: Iterable[Batch] = documents.eval_batches(
        micro_batch_size=settings.micro_batch_size,
        rank=mesh.data_rank,
        ranks=mesh.data_ranks,
        split=split,
    )
    sharder = build_sharder(model, parallelism, mesh, pad_id=documents.tokenizer.pad_id)
    if sharder is not None:
        batches = map(sharder, batches)
    loss = LanguageModelLoss(model, tile=settings.loss_tile, autocast=numerics.autocast)
    return TASKS[task](loss, batches, mesh)


def trained_on(checkpoint: str) -> Mapping[str, Any] | None:
    """The section `data` of the run that wrote a checkpoint or a run folder; None for others."""
    path = Path(checkpoint) / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return config.get("data")
