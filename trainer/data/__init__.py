"""Data: documents, tokenized once into a store, packed into rows by a plan, streamed by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.construct import call
from trainer.data.dataset import Data
from trainer.data.mixture import build_corpus, section_path, source_sections
from trainer.data.plan import Overlong, Packing
from trainer.data.stages import build_stages
from trainer.data.stream import Stream, TrainStream
from trainer.data.tokenizer import Tokenizer, build_tokenizer
from trainer.errors import ConfigError

__all__ = ["Data", "Stream", "Tokenizer", "TrainStream", "build_data", "build_tokenizer"]


def build_data(
    *,
    source: str,
    path: str | None,
    tokenizer: str,
    seq_len: int,
    batch_size: int,
    seed: int,
    eval_fraction: float,
    packing: Packing,
    overlong: Overlong,
    long_documents: Mapping[str, Any],
    sources: Mapping[str, Any] | None,
    stages: Sequence[Mapping[str, Any]] | None,
    balance: bool,
    workers: int,
    cache_dir: str,
) -> Data:
    """The keywords are the keys of conf/data; raises ConfigError naming the one that is wrong.

    Tokenizes on first use and may be called by all ranks at once, without a process group.
    """
    check_counts(seed=seed, workers=workers)
    own = {
        "path": path,
        "eval_fraction": eval_fraction,
        "packing": packing,
        "overlong": overlong,
        "long_documents": long_documents,
    }
    sections, weights = source_sections(source, sources, own)
    planned = build_stages(stages, seq_len=seq_len, batch_size=batch_size, weights=weights)
    chosen = build_tokenizer(tokenizer)
    shared: dict[str, Any] = {
        "tokenizer": chosen,
        "seed": seed,
        "cache_dir": Path(cache_dir).expanduser(),
    }
    return Data(
        sources={
            name: call(build_corpus, section, section_path(name), name=name, **shared)
            for name, section in sections.items()
        },
        tokenizer=chosen,
        stages=planned,
        seq_len=seq_len,
        seed=seed,
        balance=balance,
        workers=workers,
    )


def check_counts(**counts: int) -> None:
    """Raises ConfigError for a key of the section `data` below 0."""
    for key, value in counts.items():
        if value < 0:
            raise ConfigError(f"data.{key}={value}: must be at least 0")
