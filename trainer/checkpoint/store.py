"""Checkpoints of a run: `step_00000100/` and so on, each there as a whole or not at all.

All ranks write into a folder whose name starts with a dot and vote; rank 0 adds the manifest and
renames it, then replaces the pointer `latest`, then prunes. Tensors are in torch's distributed
format under fully-qualified names, so that engine and number of ranks may change between runs.
"""

import io
import json
import logging
import math
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from models.checkpoints.table import Shape, check_shapes
from trainer.checkpoint import random_state
from trainer.checkpoint.manifest import (
    MANIFEST,
    fingerprint,
    read_manifest,
    sync_folder,
    write_durably,
    write_manifest,
)
from trainer.checkpoint.ranks import process_rank, process_ranks, quiet, together
from trainer.errors import ConfigError

log = logging.getLogger(__name__)

State = dict[str, dict[str, Any]]

_PROGRESS = "progress.json"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointStore:
    """A collective method is called by all ranks, and raises on all if it fails on one."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """keep: how many of the newest checkpoints stay; all, if not positive."""
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: State, *, progress: dict[str, Any], config: str) -> Path:
        """Returns the checkpoint's folder, published and on disk.

        state: {"model": {name: tensor}, "optimizer": {name: value}}; progress: what JSON holds;
        config: the resolved configuration, YAML. Raises RuntimeError if any rank fails; what was
        published before stays untouched then.
        """
        path = self.folder / f"step_{step:08}"
        staging = self.folder / f".{path.name}"
        together(lambda: self._clear(staging) if process_rank() == 0 else None)
        written = together(lambda: _write(staging, state, progress, config))
        files = {name: facts for rank in written for name, facts in rank.items()}
        together(lambda: self._publish(staging, path, step, files) if process_rank() == 0 else None)
        return path

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint to go on from; None to start afresh.

        resume: "auto", the newest whole one here that is not ahead of the pointer; "none"; or the
        path of a checkpoint or of a run folder. Raises ConfigError if it leads to nothing whole.
        """
        return together(lambda: self._find(resume) if process_rank() == 0 else None)[0]

    def progress(self, path: Path) -> dict[str, Any]:
        """What `save` was given; a plain read, where the other methods are collective."""
        return json.loads((path / _PROGRESS).read_bytes())

    def load(self, path: Path, state: State) -> None:
        """Fills `state` in place and restores this rank's random generators.

        The generators stay as they are where the checkpoint is of another number of ranks. Raises
        ConfigError, before anything is filled, if the checkpoint holds another model or optimiser.
        """
        shapes = together(
            lambda: {s: {n: _shape(x) for n, x in v.items()} for s, v in state.items()}
        )
        together(lambda: _check_state(path, shapes))
        with quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        if json.loads((path / MANIFEST).read_bytes())["ranks"] == process_ranks():
            random_state.restore(torch.load(path / _rng_file(), weights_only=True))

    def _clear(self, staging: Path) -> None:
        for stale in self.folder.glob(".step_*"):
            shutil.rmtree(stale)
        staging.mkdir(parents=True)

    def _publish(
        self, staging: Path, path: Path, step: int, files: dict[str, dict[str, Any]]
    ) -> None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_manifest(staging, files, step=step, ranks=process_ranks(), versions=versions)
        sync_folder(staging)
        if path.exists():  # the run went back behind this step, over a damaged checkpoint
            path.rename(self.folder / f".{path.name}.replaced")
        staging.rename(path)
        sync_folder(self.folder)
        write_durably(self.folder / ".latest", f"{path.name}\n".encode())
        (self.folder / ".latest").replace(self.folder / "latest")
        sync_folder(self.folder)
        self._prune(step)

    def _prune(self, step: int) -> None:
        """Steps ahead of this one are of a future that was left; they do not count."""
        shutil.rmtree(self.folder / f".step_{step:08}.replaced", ignore_errors=True)
        kept = [path for number, path in _steps(self.folder) if number <= step]
        for path in kept[: -self.keep] if self.keep > 0 else []:
            shutil.rmtree(path)

    def _find(self, resume: str) -> Path | None:
        if resume == "none":
            return None
        if resume == "auto":
            return _newest(self.folder)
        path = Path(resume).expanduser()
        if _STEP.fullmatch(path.name):
            read_manifest(path)
            return path
        newest = _newest(path / "checkpoints")
        if newest is None:
            raise ConfigError(
                f"resume={resume}: no complete checkpoint there; allowed: auto, none, the path of "
                "a checkpoint step_00000100 or of a run_dir that has one"
            )
        return newest


def _newest(folder: Path) -> Path | None:
    for stale in sorted(folder.glob(".step_*")):
        log.warning("skipping %s: it was never completed", stale)
    last = _last_step(folder)
    for step, path in reversed(_steps(folder)):
        if step > last:
            log.warning("skipping checkpoint %s: the run went back behind it", path.name)
            continue
        try:
            read_manifest(path)
        except ConfigError as error:
            log.warning("skipping checkpoint %s: %s", path.name, error)
        else:
            return path
    return None


def _last_step(folder: Path) -> float:
    """The step that the pointer names: later ones are of a future that was left."""
    pointer = folder / "latest"
    match = _STEP.fullmatch(pointer.read_text().strip()) if pointer.is_file() else None
    return int(match[1]) if match else math.inf


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints, oldest first."""
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step_*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _rng_file() -> str:
    return f"rng_{process_rank():05}.pt"


def _write(
    staging: Path, state: State, progress: dict[str, Any], config: str
) -> dict[str, dict[str, Any]]:
    """Name -> fingerprint of the files that this rank wrote."""
    rng = io.BytesIO()
    torch.save(random_state.capture(), rng)
    with quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(staging), no_dist=process_ranks() == 1)
    side = {_rng_file(): rng.getvalue()}
    names = [path.name for path in staging.glob(f"__{process_rank()}_*")]
    if process_rank() == 0:
        side |= {_PROGRESS: json.dumps(progress).encode(), "config.yaml": config.encode()}
        names.append(".metadata")
    for name, data in side.items():
        write_durably(staging / name, data)
    return {name: fingerprint(staging / name) for name in [*names, *side]}


def _shapes(state: State) -> dict[str, dict[str, Shape]]:
    return {
        section: {name: _shape(value) for name, value in values.items()}
        for section, values in state.items()
    }


def _check_state(path: Path, parts: list[dict[str, dict[str, Shape]]]) -> None:
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for section in parts[0]:
        prefix = f"{section}."
        expected = {name: shape for part in parts for name, shape in part[section].items()}
        found = {
            name.removeprefix(prefix): tuple(getattr(entry, "size", ()))
            for name, entry in saved.items()
            if name.startswith(prefix)
        }
        try:
            check_shapes(expected, found, fault=f"{path} is a checkpoint of another {section}")
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _shape(value: Any) -> Shape:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
