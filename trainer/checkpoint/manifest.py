"""The manifest of a checkpoint: which files it has, how long they are and what is in them.

It is written last, before the folder gets its name: a folder without one, or that disagrees with
it, is no checkpoint. It also holds its own digest, so that no bit of it changes unnoticed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

MANIFEST = "manifest.json"

Files = Mapping[str, Mapping[str, Any]]  # name -> fingerprint


def fingerprint(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, files: Files, **facts: Any) -> None:
    """`facts` are kept beside the files."""
    write_durably(folder / MANIFEST, _signed({**facts, "files": files}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ConfigError if there is none or it is not as it was written."""
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        del manifest["sha256"]
        if _signed(manifest) == written:
            return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{folder / MANIFEST} is damaged")


def check_files(folder: Path, files: Files, names: Iterable[str]) -> None:
    """Raises ConfigError naming the first file that is missing or not as it was written."""
    for name in names:
        path, written = folder / name, files[name]
        if not path.is_file():
            raise ConfigError(f"{path} is missing")
        if path.stat().st_size != written["bytes"]:
            raise ConfigError(
                f"{path} is damaged: {path.stat().st_size} bytes, {written['bytes']} were written"
            )
        try:
            found = fingerprint(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        if found != written:
            raise ConfigError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")


def check_whole(folder: Path) -> None:
    """Raises ConfigError unless every file of the checkpoint is as it was written."""
    files = read_manifest(folder)["files"]
    check_files(folder, files, files)


def write_durably(path: Path, data: bytes) -> None:
    """Returns when the bytes are on disk; the entry in the folder needs `sync_folder`."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk is told without the name of the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Returns when creations and renames inside the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signed(manifest: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2).encode()
