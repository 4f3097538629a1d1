"""From the keys that say where documents are to the token store of them."""

from pathlib import Path
from typing import Any

from trainer.data.formats import build_source
from trainer.data.prepare import Way, open_store
from trainer.data.source import Source
from trainer.data.store import TokenStore
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError, naming

# Keys of conf/data that say where.
PLACE = ("source", "path", "column", "subset", "split")


def locate(
    *,
    source: str,
    path: str | None,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> Source | TokenStore:
    """What is there to be tokenized, or was before; raises ConfigError naming the wrong key.

    streaming: `datasets` reads without a copy in its cache.
    """
    keys: dict[str, Any] = {"column": column, "subset": subset, "split": split}
    if source != "store":
        return build_source(source, path, streaming=streaming, **keys)
    for key, value in keys.items():
        if value is not None:
            raise ConfigError(f"data.{key}={value}: data=store takes none")
    if path is None:
        raise ConfigError("data.path=null: data=store needs the folder of a token store")
    with naming("data.path", path):
        return TokenStore(Path(path).expanduser())


def open_documents(
    place: Source | TokenStore, *, tokenizer: Tokenizer, cache_dir: Path, way: Way
) -> TokenStore:
    """The tokens of what `locate` found, prepared on first use.

    Raises ConfigError naming both tokenizers if a store was made with another one.
    """
    if not isinstance(place, TokenStore):
        return open_store(place, tokenizer, cache_dir, way)
    if place.tokenizer != tokenizer.fingerprint:
        raise ConfigError(
            f"data.path={place.folder}: made with the tokenizer {place.tokenizer}, and the one of "
            f"data.tokenizer is {tokenizer.fingerprint}; allowed: data.tokenizer={place.folder}"
        )
    return place
