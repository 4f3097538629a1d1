"""The work of one process: the documents of some slices become the tokens of one shard.

A part is a folder that appears by one rename, with tokens.bin (unless no document has text),
columns.npy and a manifest. What was finished before a run was killed is found whole, or redone.
"""

import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.manifest import (
    check_whole,
    fingerprint,
    sync_folder,
    write_manifest,
)
from trainer.data.source import Record, Slice, Source
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

TOKENS, COLUMNS = "tokens.bin", "columns.npy"
LENGTH, DIGEST, FILE, ROW = range(4)  # of columns.npy [documents, 4] uint64
_BLOCK = 2**22  # tokens that are converted at once


def part_folder(parts: Path, number: int) -> Path:
    return parts / f"{number:06}"


def is_whole(folder: Path) -> bool:
    """Whether a part is there, every bit of it as it was written."""
    try:
        check_whole(folder)
    except ConfigError:
        return False
    return True


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def content_digest(text: bytes) -> int:
    """64 bits by which copies of a document are known, and documents are held out."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def write_part(
    parts: Path, number: int, source: Source, unit: Sequence[Slice], tokenizer: Tokenizer
) -> None:
    """Holds one document at a time; empty ones are left out and counted."""
    folder = part_folder(parts, number)
    staging = parts / f".{number:06}.{os.getpid()}"
    staging.mkdir()
    try:
        with (staging / TOKENS).open("wb") as file:
            facts, columns, digest = _write_documents(file, source, unit, tokenizer)
            file.flush()
            os.fsync(file.fileno())
        np.save(staging / COLUMNS, columns)
        files = {COLUMNS: fingerprint(staging / COLUMNS)}
        if facts["tokens"]:
            files[TOKENS] = {"bytes": (staging / TOKENS).stat().st_size, "sha256": digest}
        else:
            (staging / TOKENS).unlink()
        write_manifest(staging, files, **facts)
        shutil.rmtree(folder, ignore_errors=True)  # one that was damaged
        staging.rename(folder)
        sync_folder(parts)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_documents(
    file: BinaryIO, source: Source, unit: Sequence[Slice], tokenizer: Tokenizer
) -> tuple[dict[str, Any], NDArray[np.uint64], str]:
    """-> what the manifest tells, columns.npy, SHA-256 of the tokens. Rows count from the first
    slice of their file here; `rows` is how many there were of the last file."""
    content, columns, names = hashlib.sha256(), array("Q"), list[str]()
    dtype = token_dtype(tokenizer)
    start, end = np.array(tokenizer.start, dtype), np.array([tokenizer.eos_id])
    tokens = empty = row = 0
    for name, record in _records(source, unit):
        row = record.row
        ids = tokenizer.encode(record.content)
        if not len(ids):
            empty += 1
            continue
        if not names or names[-1] != name:
            names.append(name)
        for piece in (start, *_blocks(ids), end):
            data = piece.astype(dtype).data
            file.write(data)
            content.update(data)
        length = len(start) + len(ids) + 1
        columns.extend((length, content_digest(record.content), len(names) - 1, row))
        tokens += length
    documents = np.frombuffer(columns, np.uint64).reshape(-1, 4)
    facts = {"documents": len(documents), "empty": empty, "tokens": tokens, "rows": row}
    return facts | {"names": names}, documents, content.hexdigest()


def _records(source: Source, unit: Sequence[Slice]) -> Iterator[tuple[str, Record]]:
    """(file, record) of all slices; rows go on from slice to slice of a file."""
    name, before, row = "", 0, 0
    for part in unit:
        before = row if part.name == name else 0
        name, row = part.name, before
        for record in source.read(part):
            row = before + record.row
            yield name, Record(row, record.content)


def _blocks(ids: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    return (ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK))
