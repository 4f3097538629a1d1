"""JSON Lines: an object per line, one of its fields is a document. Also compressed by gzip."""

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from trainer.data.source import (
    SLICE_BYTES,
    Files,
    Record,
    Slice,
    missing_column,
    text_content,
    unreadable,
)
from trainer.errors import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class JsonLines(Files):
    """A slice has the lines that begin between two offsets; a compressed file is one slice."""

    column: str

    @property
    def read_as(self) -> tuple[str, ...]:
        return "jsonl", self.column

    def slices(self) -> list[Slice]:
        cut = []
        for name, size in self.sizes():
            if _compressed(name):
                cut.append(Slice(name, 0, sys.maxsize, size))
                continue
            for start in range(0, size, SLICE_BYTES):
                stop = min(start + SLICE_BYTES, size)
                cut.append(Slice(name, start, stop, stop - start))
        return cut

    def read(self, part: Slice) -> Iterator[Record]:
        path = self.root / part.name
        try:
            with _open(path) as lines:
                position = part.start
                if position:  # the line that goes on here is the slice's before
                    lines.seek(position - 1)
                    position += len(lines.readline()) - 1
                row = 0
                while position < part.stop and (line := lines.readline()):
                    position += len(line)
                    row += 1
                    yield Record(row, self._content(line, part, row))
        except OSError as error:
            raise unreadable(self.label, error, path) from error
        except (EOFError, zlib.error) as error:
            raise ConfigError(f"{self.label}: {path} is damaged: {error}") from error

    def _content(self, line: bytes, part: Slice, row: int) -> bytes:
        """Of the column; nothing for a blank line. Bytes that are not UTF-8 are kept."""
        line = line.strip()
        if not line:
            return b""
        try:
            record = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except json.JSONDecodeError as error:
            where = self._where(part, row)
            raise ConfigError(
                f"{self.label}: {where}: no JSON: {error.msg}, column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:  # a number or a nest beyond Python's bounds
            raise ConfigError(f"{self.label}: {self._where(part, row)}: {error}") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{self.label}: {self._where(part, row)}: not a JSON object")
        value = record.get(self.column, record)
        if value is record:
            raise missing_column(self.label, self._where(part, row), self.column, record)
        return text_content(value, lambda: f"data.column={self.column}: {self._where(part, row)}")

    def _where(self, part: Slice, row: int) -> str:
        """file:line; the lines before the slice are counted now that one of them matters."""
        before, left = (1, part.start - 1) if part.start else (0, 0)
        with _open(self.root / part.name) as file:
            while left and (block := file.read(min(left, SLICE_BYTES))):
                before += block.count(b"\n")
                left -= len(block)
        return f"{part.name}:{before + row}"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if _compressed(path.name) else path.open("rb")


def _compressed(name: str) -> bool:
    return name.endswith(".gz")
