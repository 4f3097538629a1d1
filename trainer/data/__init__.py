"""Data: documents, tokenized once into a store, packed into rows by a plan, streamed by step."""

from pathlib import Path

from trainer.data.dataset import Data
from trainer.data.opening import locate, open_documents
from trainer.data.prepare import Way
from trainer.data.stream import TrainStream
from trainer.data.tokenizer import Tokenizer, build_tokenizer
from trainer.errors import ConfigError

__all__ = ["Data", "Tokenizer", "TrainStream", "build_data", "build_tokenizer"]


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
    cache_dir: str,
    cache_workers: int | None,
    cache_wait_minutes: float,
) -> Data:
    """The keywords are the keys of conf/data; raises ConfigError naming the one that is wrong.

    Tokenizes on first use and may be called by all ranks at once, without a process group.
    """
    chosen = build_tokenizer(tokenizer)
    place = locate(source=source, path=path, column=column, subset=subset, split=split)
    if cache_workers is not None and cache_workers < 1:
        raise ConfigError(f"data.cache_workers={cache_workers}: must be at least 1, or null")
    way = Way(workers=cache_workers, wait_minutes=cache_wait_minutes)
    folder = Path(cache_dir).expanduser()
    store = open_documents(place, tokenizer=chosen, cache_dir=folder, way=way)
    return Data(
        store=store,
        tokenizer=chosen,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        eval_fraction=eval_fraction,
        overlong=overlong,
    )
