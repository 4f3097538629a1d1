"""Where documents come from. One file is one document, read as bytes, whatever it holds."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from trainer.errors import ConfigError


class Source(Protocol):
    """(name, content) of each document, in a fixed order."""

    @property
    def label(self) -> str:
        """The configuration it comes from, for messages."""
        ...

    def key(self) -> str:
        """Changes when a document may have."""
        ...

    def __iter__(self) -> Iterator[tuple[str, bytes]]: ...


@dataclass(frozen=True)
class FileSource:
    """The files `names` below `root`; raises ConfigError when one cannot be read."""

    label: str
    root: Path
    names: tuple[str, ...]

    def key(self) -> str:
        try:
            stats = [(self.root / name).stat() for name in self.names]
        except OSError as error:
            raise _unreadable(self.label, error) from error
        files = [(n, s.st_size, s.st_mtime_ns) for n, s in zip(self.names, stats, strict=True)]
        return hashlib.sha256(json.dumps([str(self.root), files]).encode()).hexdigest()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for name in self.names:
            try:
                yield name, (self.root / name).read_bytes()
            except OSError as error:
                raise _unreadable(self.label, error) from error


def standard_library() -> FileSource:
    """The source of the standard library of the interpreter in use: real, long documents."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__"}
    return _below(root, f"data=stdlib ({root})", suffix=".py", skip=skip)


def files(path: str | Path) -> FileSource:
    """One file, or every regular file below a folder."""
    label = f"data.path={path}"
    location = Path(path).expanduser().absolute()
    try:
        location.stat()
    except OSError as error:
        raise _unreadable(label, error) from error
    if location.is_file():
        return FileSource(label, location.parent, (location.name,))
    if not location.is_dir():
        raise ConfigError(f"{label}: must be a regular file or a folder")
    return _below(location, label)


def build_source(name: str, path: str | None) -> Source:
    if name not in ("stdlib", "files"):
        raise ConfigError(f"data.source={name}: must be stdlib or files")
    if name == "stdlib":
        if path is not None:
            raise ConfigError(f"data.path={path}: data=stdlib takes none, data=files does")
        return standard_library()
    if path is None:
        raise ConfigError("data.path=null: data=files needs a file or a folder")
    return files(path)


def _below(root: Path, label: str, suffix: str = "", skip: Collection[str] = ()) -> FileSource:
    names = []
    try:
        for folder, subfolders, entries in os.walk(root, onerror=_raise):
            subfolders[:] = [name for name in subfolders if name not in skip]
            paths = (Path(folder, entry) for entry in entries if entry.endswith(suffix))
            names += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    except OSError as error:
        raise _unreadable(label, error) from error
    if not names:
        raise ConfigError(f"{label}: the folder holds no {suffix or 'regular'} file")
    return FileSource(label, root, tuple(sorted(names)))


def _raise(error: OSError) -> NoReturn:
    raise error


def _unreadable(label: str, error: OSError) -> ConfigError:
    return ConfigError(f"{label}: cannot read {error.filename}: {error.strerror}")
