"""Data: documents, tokenized once into a store, packed into rows by a plan, streamed by step."""

from pathlib import Path
from typing import Any

from trainer.data.dataset import Data
from trainer.data.opening import locate, open_documents
from trainer.data.prepare import Way
from trainer.data.store import TokenStore
from trainer.data.stream import TrainStream
from trainer.data.streaming import DocumentStream, StreamedData
from trainer.data.tokenizer import Tokenizer, build_tokenizer
from trainer.errors import ConfigError

__all__ = [
    "Data",
    "DocumentStream",
    "StreamedData",
    "Tokenizer",
    "TrainStream",
    "build_data",
    "build_stream",
    "build_tokenizer",
]


def build_data(
    *,
    source: str,
    path: str | None,
    column: str | None,
    subset: str | None,
    split: str | None,
    tokenizer: str,
    seq_len: int,
    batch_size: int,
    seed: int,
    eval_fraction: float,
    overlong: str,
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
    chosen = build_tokenizer(tokenizer)
    where = {"path": path, "column": column, "subset": subset, "split": split}
    place = locate(source=source, streaming=streaming, **where)
    packing: dict[str, Any] = {
        "tokenizer": chosen,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "seed": seed,
        "eval_fraction": eval_fraction,
        "overlong": overlong,
    }
    if streaming:
        if isinstance(place, TokenStore):
            raise ConfigError(
                "data.streaming=true: data=store is tokenized already; allowed: false"
            )
        return StreamedData(source=place, window=window, eval_documents=eval_documents, **packing)
    if cache_workers is not None and cache_workers < 1:
        raise ConfigError(f"data.cache_workers={cache_workers}: must be at least 1, or null")
    way = Way(workers=cache_workers, wait_minutes=cache_wait_minutes)
    folder = Path(cache_dir).expanduser()
    store = open_documents(place, tokenizer=chosen, cache_dir=folder, way=way)
    return Data(store=store, **packing)


def build_stream(
    data: Data | StreamedData, *, micro_batch_size: int, rank: int, ranks: int
) -> TrainStream | DocumentStream:
    """The training rows of one data rank."""
    kind: Any = DocumentStream if isinstance(data, StreamedData) else TrainStream
    return kind(data, micro_batch_size=micro_batch_size, rank=rank, ranks=ranks)
