"""Data: documents, tokenized once into a store, packed into rows by a plan, streamed by step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.construct import construct
from trainer.data.dataset import Data
from trainer.data.source import build_source
from trainer.data.store import open_store
from trainer.data.stream import TrainStream
from trainer.data.task_rows import ExampleTask
from trainer.data.tokenizer import Tokenizer, build_tokenizer
from trainer.errors import ConfigError

__all__ = ["Data", "Tokenizer", "TrainStream", "build_data", "build_tokenizer"]


def build_data(
    *,
    source: str,
    path: str | None,
    task: str | None,
    options: Mapping[str, Any] | None,
    tokenizer: str,
    seq_len: int,
    batch_size: int,
    seed: int,
    eval_fraction: float,
    overlong: str,
    cache_dir: str,
) -> Data:
    """The keywords are the keys of conf/data; raises ConfigError naming the one that is wrong.

    Tokenizes on first use and may be called by all ranks at once, without a process group.
    """
    chosen = build_tokenizer(tokenizer)
    store = open_store(build_source(source, path), chosen, Path(cache_dir).expanduser())
    return Data(
        store=store,
        tokenizer=chosen,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        eval_fraction=eval_fraction,
        overlong=overlong,
        task=build_example_task(task, options),
    )


def build_example_task(task: str | None, options: Mapping[str, Any] | None) -> ExampleTask | None:
    """What makes training rows, if not documents; options: the section `tasks.<task>`."""
    if task is None:
        return None
    if options is None:
        raise ConfigError(f"data.task={task}: allowed: null; data=task takes one")
    made = construct(options, f"tasks.{task}")
    if not isinstance(made, ExampleTask):
        raise ConfigError(f"data.task={task}: has no examples; allowed: copy, kv, mqar, niah")
    return made
