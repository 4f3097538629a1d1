"""Token store: documents as token ids in one memory-mapped file, built once and shared by all.

A folder with
- tokens.bin: the ids of all documents, each ended by eos; uint16 or uint32, by vocabulary
- index.npy: `INDEX` per document
- names.jsonl: a JSON string per document
- meta.json: format, dtype, counts, tokenizer fingerprint, content hash, length histogram

It appears by one rename, so whoever finds it finds all of it.
"""

import fcntl
import hashlib
import json
import logging
import platform
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.source import Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

FORMAT = 1
# start and length in tokens, name: byte offset in names.jsonl, digest: of the document's content.
INDEX = np.dtype([("start", "<u8"), ("length", "<u8"), ("name", "<u8"), ("digest", "<u8")])

logger = logging.getLogger(__name__)


class TokenStore:
    """Reads a store; raises ConfigError if the folder is none, or not whole."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            dtype = np.dtype(meta["dtype"])
            self._tokens = np.memmap(folder / "tokens.bin", dtype, "r")
            self._index = np.load(folder / "index.npy", mmap_mode="r")
            if len(self._tokens) != meta["tokens"] or len(self._index) != meta["documents"]:
                raise ValueError("tokens.bin or index.npy has not the length that meta.json says")
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise ConfigError(f"token store {folder} is damaged, delete it: {error}") from error
        self.folder, self._names = folder, folder / "names.jsonl"
        self.hash: str = meta["hash"]
        self.tokenizer: str = meta["tokenizer"]
        self.tokens: int = meta["tokens"]
        self.length_histogram: list[int] = meta["length_histogram"]
        self.lengths = self._index["length"].astype(np.int64)  # [documents], eos included
        self.digests = np.array(self._index["digest"])  # [documents] uint64, uniform

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        """Another process opens it anew, instead of being sent the tokens."""
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens start..stop of a document, fewer where it ends before."""
        first = int(self._index["start"][document])
        length = int(self.lengths[document])
        return self._tokens[first + min(start, length) : first + min(stop, length)]

    def name(self, document: int) -> str:
        with self._names.open("rb") as names:
            names.seek(int(self._index["name"][document]))
            return json.loads(names.readline())


def open_store(source: Source, tokenizer: Tokenizer, cache_dir: Path) -> TokenStore:
    """The store of this source and tokenizer in the cache, built first if it is not there.

    Any number of processes may call at once: one on each machine builds, the others wait for its
    file lock. Where machines share the cache without sharing locks, the first to finish wins.
    """
    identity = f"{FORMAT} {source.key()} {tokenizer.fingerprint}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = cache_dir / key
    with _locked(cache_dir, key):
        if not folder.exists():
            staging = cache_dir / f".{key}.{platform.node()}"
            shutil.rmtree(staging, ignore_errors=True)  # of a build that was killed
            try:
                build_store(staging, source, tokenizer)
                _publish(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return TokenStore(folder)


@contextmanager
def _locked(cache_dir: Path, key: str) -> Iterator[None]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / f".{key}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the kernel frees it even if the process is killed
            yield
    except OSError as error:
        raise ConfigError(f"data.cache_dir={cache_dir}: cannot write: {error.strerror}") from error


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another machine was first, with the same content
            raise


def build_store(folder: Path, source: Source, tokenizer: Tokenizer) -> None:
    """Writes a new folder, holding one document at a time; empty documents are left out.

    Raises ConfigError if no document is left.
    """
    logger.info("tokenizing %s", source.label)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    content, index = hashlib.sha256(), array("Q")
    tokens = empty = 0
    folder.mkdir()
    with (folder / "tokens.bin").open("wb") as ids, (folder / "names.jsonl").open("wb") as names:
        for name, text in source:
            document = tokenizer.encode(text)
            if not len(document):
                empty += 1
                continue
            data = np.append(document, tokenizer.eos_id).astype(dtype).tobytes()
            digest = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
            index.extend((tokens, len(document) + 1, names.tell(), digest))
            ids.write(data)
            names.write(json.dumps(name).encode() + b"\n")
            content.update(data)
            tokens += len(document) + 1
    if not tokens:
        raise ConfigError(f"{source.label}: no text, every file is empty")
    records = np.frombuffer(index, INDEX)
    np.save(folder / "index.npy", records)
    content.update(records["length"].tobytes() + records["digest"].tobytes())
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "documents": len(records),
        "empty_documents": empty,
        "tokens": tokens,
        "tokenizer": tokenizer.fingerprint,
        "hash": content.hexdigest(),
        "length_histogram": length_histogram(records["length"]),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def length_histogram(lengths: NDArray[np.integer]) -> list[int]:
    """Entry i counts the lengths in [2^i, 2^(i + 1))."""
    return np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1).tolist()
