"""The command that turns documents into a token store, and shows what one holds."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.construct import call
from trainer.data import build_data
from trainer.data.inspection import describe
from trainer.data.opening import PLACE, locate
from trainer.data.prepare import Way, prepare, store_key, unfinished
from trainer.data.store import TokenStore
from trainer.data.tokenizer import build_tokenizer
from trainer.errors import ConfigError, naming

log = logging.getLogger(__name__)


def prepare_or_inspect(
    *,
    data: Mapping[str, Any],
    output: str,
    workers: int | None,
    shard_mb: int,
    inspect: bool,
    verify: bool,
    samples: int,
) -> Iterator[str]:
    """Lines about the store at `output`; the keywords are the keys of conf/prepare_data.yaml.

    Raises ConfigError naming the key that is wrong.
    """
    call(build_data, data, "data", partial=True)  # for the types of the values
    for key, value, least in (("workers", workers, 1), ("shard_mb", shard_mb, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    if samples < 0:
        raise ConfigError(f"samples={samples}: must be at least 0")
    if verify and not inspect:
        raise ConfigError("verify=true: allowed with inspect=true")
    folder = Path(output).absolute()
    if not inspect:
        store = _prepare(data, folder, Way(workers=workers, unit_bytes=shard_mb * 10**6))
        yield f"{folder}: {len(store):,} documents, {store.tokens:,} tokens"
        return
    with naming("output", output):
        store = TokenStore(folder)
    yield from describe(
        store, build_tokenizer(str(folder)), seq_len=data["seq_len"], samples=samples
    )
    if verify:
        with naming("output", output):
            store.verify()
        yield f"all {len(store.files):,} files are as they were written"


def _prepare(data: Mapping[str, Any], folder: Path, way: Way) -> TokenStore:
    source = locate(**{key: data[key] for key in PLACE})
    if isinstance(source, TokenStore):
        raise ConfigError(f"data.path={data['path']}: this is a token store already")
    tokenizer = build_tokenizer(data["tokenizer"])
    if folder.exists():
        _check_same(folder, store_key(source, tokenizer, way.unit_bytes))
        log.info("output=%s: it is there already, made of the same", folder)
    work, place = unfinished(folder), f"output={folder}"
    return prepare(source, tokenizer, folder, work=work, way=way, place=place)


def _check_same(folder: Path, made_from: str) -> None:
    """Nothing is overwritten; a command that was killed behind its last step may be repeated."""
    try:
        same = TokenStore(folder).made_from == made_from
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(f"output={folder}: it exists; allowed: a new folder")
