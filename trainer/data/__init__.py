"""Data: documents, tokenized once into a store, packed into rows by a plan, streamed by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.construct import call
from trainer.data.dataset import Data
from trainer.data.mixture import build_corpus, section_path, source_sections
from trainer.data.opening import PLACE, locate
from trainer.data.plan import Overlong, Packing
from trainer.data.prepare import Way
from trainer.data.source import Source
from trainer.data.stages import build_stages
from trainer.data.store import TokenStore
from trainer.data.stream import Stream, TrainStream
from trainer.data.streaming import DocumentStream, StreamedData
from trainer.data.tokenizer import Tokenizer, build_tokenizer
from trainer.errors import ConfigError

__all__ = [
    "Data",
    "DocumentStream",
    "Stream",
    "StreamedData",
    "Tokenizer",
    "TrainStream",
    "build_data",
    "build_tokenizer",
]


def build_data(
    *,
    source: str,
    path: str | None,
    column: str | None,
    subset: str | None,
    split: str | None,
    task: str | None,
    options: Mapping[str, Any] | None,
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
    streaming: bool,
    window: int,
    eval_documents: int,
    cache_dir: str,
    cache_workers: int | None,
    cache_wait_minutes: float,
) -> Data | StreamedData:
    """The keywords are the keys of conf/data; raises ConfigError naming the one that is wrong.

    Without streaming it tokenizes on first use; may be called by all ranks at once, without a
    process group.
    """
    check_counts(seed=seed, workers=workers)
    own = {
        "path": path,
        "column": column,
        "subset": subset,
        "split": split,
        "task": task,
        "options": options,
        "eval_fraction": eval_fraction,
        "packing": packing,
        "overlong": overlong,
        "long_documents": long_documents,
    }
    sections, weights = source_sections(source, sources, own)
    planned = build_stages(stages, seq_len=seq_len, batch_size=batch_size, weights=weights)
    chosen = build_tokenizer(tokenizer)
    if streaming:
        planned_only = {
            "sources": sources,
            "task": task,
            "stages": stages,
            "packing": None if packing == "best_fit" else packing,
            "long_documents.above": long_documents.get("above"),
            "balance": balance or None,
            "workers": workers or None,
        }
        check_unplanned(planned_only)
        return StreamedData(
            source=_documents(sections[""]),
            tokenizer=chosen,
            stage=planned[0],
            seed=seed,
            eval_fraction=eval_fraction,
            eval_documents=eval_documents,
            overlong=overlong,
            window=window,
        )
    shared: dict[str, Any] = {
        "tokenizer": chosen,
        "seed": seed,
        "cache_dir": Path(cache_dir).expanduser(),
        "way": build_way(cache_workers, cache_wait_minutes),
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


def build_way(workers: int | None, wait_minutes: float) -> Way:
    if workers is not None and workers < 1:
        raise ConfigError(f"data.cache_workers={workers}: must be at least 1, or null")
    return Way(workers=workers, wait_minutes=wait_minutes)


def check_unplanned(settings: Mapping[str, object]) -> None:
    """Raises ConfigError for a setting that only planned rows have."""
    for key, value in settings.items():
        if value is not None:
            raise ConfigError(
                f"data.{key}={value}: data.streaming=true makes no plan of rows; allowed: what "
                "conf/data/packing.yaml has, or data.streaming=false"
            )


def _documents(section: Mapping[str, Any]) -> Source:
    place = locate(**{key: section[key] for key in PLACE}, streaming=True)
    if isinstance(place, TokenStore):
        raise ConfigError("data.streaming=true: data=store is tokenized already; allowed: false")
    return place


def check_counts(**counts: int) -> None:
    """Raises ConfigError for a key of the section `data` below 0."""
    for key, value in counts.items():
        if value < 0:
            raise ConfigError(f"data.{key}={value}: must be at least 0")
