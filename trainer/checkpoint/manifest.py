"""The manifest of a checkpoint: which files it has, how long they are and what is in them.

It is written last, before the folder gets its name: a folder without one, or that disagrees with
it, is no checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

MANIFEST = "manifest.json"


def fingerprint(path: Path) -> dict[str, Any]:
    """Length and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """`files`: name -> fingerprint; `facts` are kept beside them."""
    text = json.dumps({**facts, "files": files}, indent=2)
    write_durably(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises ConfigError, naming the first file that is missing or not as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise ConfigError(f"{folder} is incomplete: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder / MANIFEST} is damaged") from None
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing")
        if path.stat().st_size != written["bytes"]:
            raise ConfigError(
                f"{path} is damaged: {path.stat().st_size} bytes, {written['bytes']} were written"
            )
        if fingerprint(path) != written:
            raise ConfigError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return manifest


def write_durably(path: Path, data: bytes) -> None:
    """Returns when the bytes are on disk; the entry in the folder needs `sync_folder`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when creations and renames inside the folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
