"""From the parts of all units to a whole store: one index over them, and the manifest."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.manifest import fingerprint, read_manifest, sync_folder, write_manifest
from trainer.data.part import COLUMNS, DIGEST, FILE, LENGTH, ROW, TOKENS, part_folder, token_dtype
from trainer.data.source import Slice
from trainer.data.store import FORMAT, INDEX, NAMES, Column, length_histogram, shard_name
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError


class _Part(NamedTuple):
    folder: Path
    facts: dict[str, Any]
    first: str  # file of its first slice
    rows_before: int  # of that file, in parts before this one


def assemble(
    folder: Path,
    parts: Path,
    units: Sequence[Sequence[Slice]],
    *,
    label: str,
    made_from: str,
    tokenizer: Tokenizer,
) -> None:
    """Writes the store into an empty folder; the tokens are moved there from the parts, last.

    Raises ConfigError if no document has text.
    """
    found = list(_parts(parts, units))
    documents = sum(part.facts["documents"] for part in found)
    if not documents:
        raise ConfigError(f"{label}: no text, every document is empty")
    # Written before it is mapped: a full disk is an error here, and would be a signal there.
    np.save(folder / INDEX, np.zeros((len(Column), documents), "<u8"))
    index = np.load(folder / INDEX, mmap_mode="r+")
    _fill(index, folder / NAMES, found)
    index.flush()
    tokenizer.save(folder)
    files = {path.name: fingerprint(path) for path in sorted(folder.iterdir())}
    shards: list[int] = []
    for part in found:
        if part.facts["tokens"]:
            name = shard_name(len(shards))
            (part.folder / TOKENS).rename(folder / name)
            files[name] = part.facts["files"][TOKENS]
            shards.append(part.facts["tokens"])
    write_manifest(
        folder,
        files,
        format=FORMAT,
        dtype=token_dtype(tokenizer).name,
        documents=documents,
        empty_documents=sum(part.facts["empty"] for part in found),
        tokens=sum(shards),
        shards=shards,
        tokenizer=tokenizer.fingerprint,
        hash=_content_hash(index, tokenizer),
        length_histogram=length_histogram(index[Column.LENGTH]),
        made_from=made_from,
    )
    sync_folder(folder)


def _parts(parts: Path, units: Sequence[Sequence[Slice]]) -> Iterator[_Part]:
    last, rows = "", 0
    for number, unit in enumerate(units):
        folder, first = part_folder(parts, number), unit[0].name
        facts = read_manifest(folder)
        before = rows if first == last else 0
        yield _Part(folder, facts, first, before)
        last, rows = unit[-1].name, facts["rows"]
        if first == last:
            rows += before


def _fill(index: NDArray[np.uint64], names: Path, parts: Sequence[_Part]) -> None:
    """Writes names.jsonl and all columns."""
    first = tokens = 0
    last, offset = "", 0
    with names.open("wb") as file:
        for part in parts:
            columns = np.load(part.folder / COLUMNS)
            offsets = np.zeros(len(part.facts["names"]), np.uint64)
            continued = np.zeros(len(offsets), np.uint64)
            for i, name in enumerate(part.facts["names"]):
                if name != last:
                    last, offset = name, file.tell()
                    file.write(json.dumps(name).encode() + b"\n")
                offsets[i] = offset
                continued[i] = part.rows_before if name == part.first else 0
            target = index[:, first : first + len(columns)]
            length, owner, row = (
                columns[:, LENGTH],
                columns[:, FILE].astype(np.int64),
                columns[:, ROW],
            )
            target[Column.LENGTH] = length
            target[Column.DIGEST] = columns[:, DIGEST]
            target[Column.START] = tokens + np.cumsum(length) - length
            target[Column.NAME] = offsets[owner]
            target[Column.ROW] = np.where(row > 0, row + continued[owner], 0)
            first += len(columns)
            tokens += part.facts["tokens"]


def _content_hash(index: NDArray[np.uint64], tokenizer: Tokenizer) -> str:
    """Of the texts, the tokenizer and what it made of each, however they lie in shards."""
    content = hashlib.sha256(tokenizer.fingerprint.encode())
    for column in (Column.LENGTH, Column.DIGEST):
        content.update(index[column].data)
    return content.hexdigest()
