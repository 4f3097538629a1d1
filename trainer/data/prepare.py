"""Preparing a token store: parallel, resumable, and published whole or not at all.

What is to be done is cut into units by the source alone. Finished ones stay in a folder whose name
starts with a dot until the store is published, so a run that was killed goes on where it was.
"""

import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from trainer.checkpoint.manifest import sync_folder, write_durably
from trainer.data.assemble import assemble
from trainer.data.lock import locked
from trainer.data.part import is_whole, part_folder, write_part
from trainer.data.progress import Progress
from trainer.data.source import Slice, Source, units
from trainer.data.store import FORMAT, TokenStore
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.signals import end_with_parent, ignore_stop_signals

log = logging.getLogger(__name__)

UNIT_BYTES = 2**26  # of source: the size of shards, and the most that a killed process loses


def store_key(source: Source, tokenizer: Tokenizer, unit_bytes: int = UNIT_BYTES) -> str:
    """Equal for two stores only if the same bytes would be written for both."""
    identity = f"{FORMAT} {source.key()} {tokenizer.fingerprint} {unit_bytes}"
    return hashlib.sha256(identity.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a store is prepared, whatever it is made of.

    workers: processes that tokenize, None for one for each CPU; wait_minutes: for another process
    that prepares the same store; unit_bytes: see `UNIT_BYTES`.
    """

    workers: int | None = None
    wait_minutes: float = 0.0
    unit_bytes: int = UNIT_BYTES


def unfinished(folder: Path) -> Path:
    """The folder beside it for what is on its way into it; whatever else is there may be removed,
    so it has a name that nothing else has."""
    return folder.with_name(f".{folder.name}.unfinished")


def open_store(source: Source, tokenizer: Tokenizer, cache_dir: Path, way: Way) -> TokenStore:
    """The store of this source and tokenizer in the cache, prepared first if it is not there.

    Where machines share the cache without sharing locks, each prepares, and the first wins.
    """
    key = store_key(source, tokenizer, way.unit_bytes)[:32]
    work = unfinished(cache_dir / f"{key}.{platform.node()}")
    place = f"data.cache_dir={cache_dir}"
    return prepare(source, tokenizer, cache_dir / key, work=work, way=way, place=place)


def prepare(
    source: Source, tokenizer: Tokenizer, folder: Path, *, work: Path, way: Way, place: str
) -> TokenStore:
    """The store at `folder`, prepared first if nothing is there.

    Any number of processes may call at once: one of a machine prepares, the others wait for its
    file lock; where there are none each prepares, and the first wins. work: a folder beside
    `folder` for what is unfinished; place: the key that says where to write. Raises ConfigError.
    """
    try:
        with locked(folder, minutes=way.wait_minutes) as held:
            if not folder.exists():
                if not held:
                    work = work.with_name(f"{work.name}.{os.getpid()}")
                    log.warning("%s cannot be locked: each process prepares it by itself", folder)
                _prepare(source, tokenizer, folder, work, way)
    except OSError as error:
        name = error.filename or work
        reason = error.strerror or error
        raise ConfigError(f"{place}: cannot write {name}: {reason}") from error
    return TokenStore(folder)


def _prepare(source: Source, tokenizer: Tokenizer, folder: Path, work: Path, way: Way) -> None:
    parts, store = work / "parts", work / "store"
    made_from = store_key(source, tokenizer, way.unit_bytes)
    _open_work(work, made_from)
    todo = units(source.slices(), way.unit_bytes)
    _tokenize(parts, source, tokenizer, todo, way.workers or _cpus())
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    assemble(store, parts, todo, label=source.label, made_from=made_from, tokenizer=tokenizer)
    try:
        store.rename(folder)
        sync_folder(folder.parent)
    except OSError:
        if not folder.exists():  # otherwise another machine was first, with the same content
            raise
    shutil.rmtree(work, ignore_errors=True)


def _open_work(work: Path, made_from: str) -> None:
    """A folder for parts of this very store; what another left there, or half of a part, goes."""
    identity = work / "made_from"
    if not identity.is_file() or identity.read_text() != made_from:
        shutil.rmtree(work, ignore_errors=True)
        (work / "parts").mkdir(parents=True)
        write_durably(identity, made_from.encode())
    for half in (work / "parts").glob(".*"):
        shutil.rmtree(half, ignore_errors=True)


def _tokenize(
    parts: Path,
    source: Source,
    tokenizer: Tokenizer,
    todo: Sequence[tuple[Slice, ...]],
    workers: int,
) -> None:
    """Leaves a whole part for every unit, each made by one of the workers."""
    sizes = [sum(part.size for part in unit) for unit in todo]
    workers = min(workers, len(todo))
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(source.label, sum(sizes)))
        if workers <= 1:
            for number, unit in enumerate(todo):
                made = _make(number, unit, parts, source, tokenizer)
                progress.add(sizes[number], made)
            return
        # Forked from a process of its own: a child of this one would inherit the locks of threads
        # that do not run in it.
        context = get_context("forkserver")
        pool = ProcessPoolExecutor(workers, context, _start, (parts, source, tokenizer))
        stack.callback(pool.shutdown, cancel_futures=True)
        futures = {pool.submit(_work, n, unit): n for n, unit in enumerate(todo)}
        try:
            for future in as_completed(futures):
                progress.add(sizes[futures[future]], future.result())
        except BrokenProcessPool as error:
            raise ConfigError(
                f"{source.label}: a worker process ended, perhaps for want of memory; allowed: "
                "fewer workers; what is finished stays and is not done again"
            ) from error


def _cpus() -> int:
    """Of this process; of the machine where the system does not tell."""
    tells = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if tells else os.cpu_count() or 1


def _make(
    number: int, unit: Sequence[Slice], parts: Path, source: Source, tokenizer: Tokenizer
) -> bool:
    """-> whether there was anything to do."""
    if is_whole(part_folder(parts, number)):
        return False
    write_part(parts, number, source, unit, tokenizer)
    return True


_job: tuple[Path, Source, Tokenizer]  # of a worker process


def _start(*job: object) -> None:
    global _job
    end_with_parent()
    ignore_stop_signals()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each CPU
    _job = job  # type: ignore[assignment]


def _work(number: int, unit: Sequence[Slice]) -> bool:
    return _make(number, unit, *_job)
