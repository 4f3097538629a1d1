"""The tensors of a checkpoint on disk, in the format of torch.distributed.checkpoint."""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from trainer.checkpoint.manifest import Files, fingerprint, sync_folder, write_durably
from trainer.checkpoint.ranks import Ranks
from trainer.engine import State

Listing = Mapping[tuple[str, str], int]  # (section, name) -> bytes

INDEX = ".metadata"  # which tensor is where

# Said of every process that reads by itself. Not around the calls: that is not safe in threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def write_shards(folder: Path, state: State, ranks: Ranks) -> Files:
    """Writes this rank's part durably; -> the fingerprints of its files. Collective.

    Raises OSError naming the file, also for what happened on another rank, and where this rank
    sees no such folder.
    """
    writer = dcp.FileSystemWriter(folder)
    writer.fs = _NamedFiles()
    try:
        alone = ranks.group is None
        dcp.save(state, storage_writer=writer, process_group=ranks.group, no_dist=alone)
    except CheckpointException as failed:  # which is no Exception
        raise next(iter(failed.failures.values()))[0] from failed
    sync_folder(folder)
    names = [path.name for path in folder.glob(f"__{ranks.rank}_*")]
    return {name: fingerprint(folder / name) for name in names + [INDEX] * (ranks.rank == 0)}


def local_bytes(state: State) -> int:
    """Of the tensors, or of the shards of them that are here."""
    tensors = (x for values in state.values() for x in values.values())
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


def write_side_files(folder: Path, files: Mapping[str, bytes]) -> Files:
    """What is kept beside the tensors; -> fingerprints."""
    for name, data in files.items():
        write_durably(folder / name, data)
    sync_folder(folder)
    return {name: fingerprint(folder / name) for name in files}


class TensorReader(dcp.FileSystemReader):
    """Reads the index of a checkpoint, long for many ranks, once and not for every tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


class Shares:
    """Of plain tensors that several ranks hold each is copied and written by one of them."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._known: list[str] = []  # digests of the listings that `_writers` follows from
        self._writers: dict[tuple[str, str], int] = {}

    def own(self, state: State) -> State:
        """The part of the state that this rank writes. Collective."""
        listing = {
            (section, name): x.nbytes
            for section, values in state.items()
            for name, x in values.items()
            if not isinstance(x, DTensor)
        }
        digest = hashlib.sha256(repr(sorted(listing.items())).encode()).hexdigest()
        digests = self._ranks.together(lambda: digest)
        if digests != self._known:
            self._writers = assign(self._ranks.together(lambda: listing))
            self._known = digests
        rank = self._ranks.rank
        return {
            section: {
                n: x for n, x in values.items() if self._writers.get((section, n), rank) == rank
            }
            for section, values in state.items()
        }


def assign(listings: Sequence[Listing]) -> dict[tuple[str, str], int]:
    """By name the rank that writes it: one of those that list it, all with about as much to do."""
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, listing in enumerate(listings):
        for key in listing:
            holders.setdefault(key, []).append(rank)
    size = {key: listings[ranks[0]][key] for key, ranks in holders.items()}
    load = [0] * len(listings)
    writers = {}
    for key in sorted(holders, key=lambda key: (-size[key], key)):
        writers[key] = min(holders[key], key=lambda rank: load[rank])
        load[writers[key]] += size[key]
    return writers


class _NamedFiles(FileSystem):
    """Its errors name the file, and are those of the system: torch.save turns a full disk into a
    RuntimeError about positions."""

    def mkdir(self, path: str | os.PathLike) -> None:
        """Not here: rank 0 has made it. One that this rank made would be seen by no other."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error
