"""Where documents come from: a source cut into slices that any process can read by itself."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from trainer.errors import ConfigError

SLICE_BYTES = 2**22  # about how much of one file a slice has; what it cannot cut is larger


class Slice(NamedTuple):
    """A part of one file; what start and stop count is the source's own matter."""

    name: str  # of the file
    start: int
    stop: int
    size: int  # in bytes, about


class Record(NamedTuple):
    """A document, empty if there is nothing in it."""

    row: int  # from 1 inside its slice; 0: it is the whole file
    content: bytes


class Source(Protocol):
    """Documents in a fixed order. Can be pickled; raises ConfigError for what cannot be read."""

    @property
    def label(self) -> str:
        """The configuration it comes from, for messages."""
        ...

    def key(self) -> str:
        """Changes when a document may have."""
        ...

    def outline(self) -> str:
        """The same wherever the same source lies: what can be told of it without reading it."""
        ...

    def slices(self) -> list[Slice]:
        """All of it, in order, cut as the source alone decides."""
        ...

    def read(self, part: Slice) -> Iterator[Record]: ...


@dataclass(frozen=True)
class Files:
    """The files `names` below `root`."""

    label: str
    root: Path
    names: tuple[str, ...]

    @cached_property
    def _stats(self) -> list[os.stat_result]:
        try:
            return [(self.root / name).stat() for name in self.names]
        except OSError as error:
            raise unreadable(self.label, error) from error

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((name, stat.st_size) for name, stat in zip(self.names, self._stats, strict=True))

    @property
    def read_as(self) -> tuple[str, ...]:
        """What else decides which documents the files hold."""
        return ()

    def key(self) -> str:
        times = [stat.st_mtime_ns for stat in self._stats]
        return _digest([str(self.root), *self.read_as], [*self.sizes()], times)

    def outline(self) -> str:
        return _digest([*self.read_as], [*self.sizes()])


class FileSource(Files):
    """One file is one document, read as bytes, whatever it holds."""

    def slices(self) -> list[Slice]:
        return [Slice(name, 0, size, size) for name, size in self.sizes()]

    def read(self, part: Slice) -> Iterator[Record]:
        try:
            content = (self.root / part.name).read_bytes()
        except OSError as error:
            raise unreadable(self.label, error) from error
        yield Record(0, content)


def units(slices: Iterable[Slice], size: int) -> list[tuple[Slice, ...]]:
    """Consecutive slices, each unit as short as can be for `size` bytes."""
    made: list[tuple[Slice, ...]] = []
    open_unit: list[Slice] = []
    filled = 0
    for part in slices:
        open_unit.append(part)
        filled += part.size
        if filled >= size:
            made.append(tuple(open_unit))
            open_unit, filled = [], 0
    return [*made, tuple(open_unit)] if open_unit else made


def find_files(path: str, *suffixes: str) -> tuple[str, Path, tuple[str, ...]]:
    """The fields of `Files`: the one file of that path, or every regular one below a folder whose
    name ends with one of the suffixes, if any are given."""
    label = f"data.path={path}"
    location = Path(path).expanduser().absolute()
    try:
        location.stat()
    except OSError as error:
        raise unreadable(label, error) from error
    if location.is_file():
        return label, location.parent, (location.name,)
    if not location.is_dir():
        raise ConfigError(f"{label}: must be a regular file or a folder")
    return label, location, below(location, label, suffixes)


def text_content(value: object, where: Callable[[], str]) -> bytes:
    """Of a field that holds text; nothing for null. Raises ConfigError for anything else.

    JSON can spell half a surrogate pair, which UTF-8 has no place for; its bytes are kept too.
    """
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ConfigError(f"{where()} is not text but {type(value).__name__}")
    try:
        return value.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", errors="surrogatepass")


def missing_column(label: str, where: str, column: str, existing: Iterable[str]) -> ConfigError:
    known = ", ".join(existing) or "none"
    return ConfigError(
        f"data.column={column}: {label}: {where} has no such column; it has: {known}"
    )


def unreadable(label: str, error: OSError, path: Path | None = None) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"{label}: cannot read {error.filename or path}: {reason}")


def below(
    root: Path, label: str, suffixes: tuple[str, ...] = (), skip: Collection[str] = ()
) -> tuple[str, ...]:
    """Regular files by their paths from `root`, sorted; raises ConfigError if there is none."""
    names = []
    try:
        for folder, subfolders, entries in os.walk(root, onerror=_raise):
            subfolders[:] = [name for name in subfolders if name not in skip]
            paths = (Path(folder, entry) for entry in entries if entry.endswith(suffixes or ""))
            names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    except OSError as error:
        raise unreadable(label, error) from error
    if not names:
        kind = " or ".join(suffixes) or "regular"
        raise ConfigError(f"{label}: the folder holds no {kind} file")
    return tuple(sorted(names))


def _digest(*facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _raise(error: OSError) -> NoReturn:
    raise error
