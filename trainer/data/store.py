"""Token store: documents as token ids in memory-mapped files, prepared once and shared by all.

A folder with
- tokens_000000.bin, ...: shards, the ids of whole documents one behind the other, each ended by
  eos; little-endian uint16 or uint32, by vocabulary
- index.npy: [columns, documents] uint64, a column behind the other, see `Column`
- names.jsonl: a JSON string for each file that documents come from
- the tokenizer's files, if it has any
- manifest.json: format, dtype, counts, tokens of each shard, fingerprint of the tokenizer, hash,
  length histogram; and of every other file its length and SHA-256

The bytes follow from the source, the tokenizer and the size of shards alone, never from how many
processes wrote them. The folder appears by one rename, so whoever finds it finds all of it.

Opening reads the manifest and compares lengths of files, whatever the store's size; `verify` reads
all of it and compares digests.
"""

import enum
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.manifest import check_files, read_manifest
from trainer.errors import ConfigError

FORMAT = 2
INDEX, NAMES = "index.npy", "names.jsonl"


class Column(enum.IntEnum):
    """Of the index."""

    LENGTH = 0  # in tokens, eos included
    DIGEST = 1  # first 8 bytes of the SHA-256 of the document's text, little-endian
    START = 2  # tokens of all documents before
    NAME = 3  # where in names.jsonl its file stands
    ROW = 4  # in that file, from 1; 0: the file is the document


class Origin(NamedTuple):
    """Where a document comes from."""

    file: str
    row: int  # a line or a row of the file, from 1; 0: the whole file

    def __str__(self) -> str:
        return f"{self.file}:{self.row}" if self.row else self.file


class TokenStore:
    """Reads a store; raises ConfigError if the folder is none, or not whole.

    Pickled, it is its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = _open_manifest(folder)
        self.files: dict[str, dict[str, Any]] = meta["files"]
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.hash: str = meta["hash"]
        self.tokenizer: str = meta["tokenizer"]
        self.made_from: str = meta["made_from"]  # see prepare.store_key
        self.tokens: int = meta["tokens"]
        self.empty_documents: int = meta["empty_documents"]
        self.length_histogram: list[int] = meta["length_histogram"]
        self.shards: list[int] = meta["shards"]  # tokens of each
        self._shard_starts = [0, *accumulate(self.shards)]
        self._open_shards: dict[int, NDArray[np.integer]] = {}
        self._index = np.asarray(np.load(folder / INDEX, mmap_mode="r"))
        self.lengths = self._index[Column.LENGTH].view(np.int64)  # [documents], eos included
        self.digests = self._index[Column.DIGEST]  # [documents] uint64, uniform

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def __reduce__(self) -> tuple:
        return TokenStore, (self.folder,)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens start..stop of a document, fewer where it ends before."""
        first = int(self._index[Column.START, document])
        length = int(self.lengths[document])
        shard = bisect_right(self._shard_starts, first) - 1
        first -= self._shard_starts[shard]
        return self._shard(shard)[first + min(start, length) : first + min(stop, length)]

    def origin(self, document: int) -> Origin:
        return Origin(
            self.file_at(int(self._index[Column.NAME, document])),
            int(self._index[Column.ROW, document]),
        )

    def name(self, document: int) -> str:
        """`origin`, for messages."""
        return str(self.origin(document))

    def file_at(self, offset: int) -> str:
        """The file that stands there in names.jsonl."""
        with (self.folder / NAMES).open("rb") as names:
            names.seek(offset)
            return json.loads(names.readline())

    def tokens_by_file(self) -> list[tuple[str, int]]:
        """(file, tokens), the one with most first."""
        offsets, owner = np.unique(self._index[Column.NAME], return_inverse=True)
        tokens = np.bincount(owner, self.lengths).astype(np.int64)
        order = np.argsort(-tokens, kind="stable")
        return [(self.file_at(int(offsets[i])), int(tokens[i])) for i in order]

    def verify(self) -> None:
        """Reads everything; raises ConfigError naming the first file that is damaged."""
        check_files(self.folder, self.files, self.files)

    def _shard(self, shard: int) -> NDArray[np.integer]:
        if shard not in self._open_shards:
            path = self.folder / shard_name(shard)
            self._open_shards[shard] = np.asarray(np.memmap(path, self.dtype, "r"))
        return self._open_shards[shard]


def shard_name(shard: int) -> str:
    return f"tokens_{shard:06}.bin"


def length_histogram(lengths: NDArray[np.integer]) -> list[int]:
    """Entry i counts the lengths in [2^i, 2^(i + 1))."""
    return np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1).tolist()


def _open_manifest(folder: Path) -> dict[str, Any]:
    """Of a store whose files are as long as it says."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no token store: no such folder")
    try:
        meta = read_manifest(folder)
        if meta.get("format") != FORMAT:
            found = meta.get("format")
            raise ConfigError(f"it has format {found}, this version reads {FORMAT}")
        for name, written in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != written["bytes"]:
                raise ConfigError(f"{name} has {size} bytes, {written['bytes']} were written")
    except ConfigError as error:
        raise ConfigError(f"token store {folder} cannot be used: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"token store {folder} is damaged: {error.filename}: {error.strerror}"
        ) from error
    return meta
