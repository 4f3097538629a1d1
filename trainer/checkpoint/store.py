"""Checkpoints of a run: `step_00000100/` and so on, each there as a whole or not at all.

A save copies what this rank has to write, all ranks write it into a folder whose name starts with
a dot and vote; rank 0 adds the manifest and renames the folder, then replaces the pointer `latest`,
then prunes. All of it may go on in a thread while the run trains: what changes the state waits for
the copies only. Tensors are in torch's distributed format under fully-qualified names, so that
engine and number of ranks may change between runs.
"""

import io
import json
import logging
import math
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint import random_state
from trainer.checkpoint.folder import STEP, CheckpointFolder
from trainer.checkpoint.keep import Figures, Keep
from trainer.checkpoint.manifest import check_files, read_manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.reader import CONFIG, PROGRESS, CheckpointReader
from trainer.checkpoint.saving import Save
from trainer.checkpoint.shards import Shares
from trainer.checkpoint.staging import HostBuffers
from trainer.engine import State
from trainer.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)


class CheckpointStore:
    """All ranks call its methods alike.

    A save that meets a full disk, a missing permission or another fault of the file system on any
    rank is given up on all, in one warning line; what was published before stays untouched.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: Keep | None = None,
        group: dist.ProcessGroup | None = None,
        background: bool = False,
    ) -> None:
        """group: the ranks of the run, for messages of checkpoints alone; None for a single one."""
        self.folder, self.background = folder, background
        self._keep = keep or Keep()
        self._files = CheckpointFolder(folder)
        self._ranks = Ranks(group)
        self._shares = Shares(self._ranks)
        self._buffers = HostBuffers()
        self._origin: str | None = None  # see `Save`
        self._saving: Future[Path] | None = None
        self._staged = threading.Event()
        self._staged.set()

    def save(
        self,
        step: int,
        state: State,
        *,
        progress: dict[str, Any],
        config: str,
        figures: Figures | None = None,
    ) -> None:
        """Starts a save when the one before has ended; done on return if not in the background.

        state: {"model": {name: tensor}, "optimizer": {name: tensor}}, live: nothing may change it
        before `wait_staged`. A plain tensor is alike on all ranks that have it, which need not be
        all. progress: what JSON holds; config: the resolved configuration, YAML; figures: of the
        evaluation at this step. Raises RuntimeError for what is no fault of the file system, a
        background save at the next call.
        """
        self.drain()
        generators = io.BytesIO()
        torch.save(random_state.capture(), generators)
        side = {random_state.file_name(self._ranks.rank): generators.getvalue()}
        if self._ranks.rank == 0:
            side |= {PROGRESS: json.dumps(progress).encode(), CONFIG: config.encode()}
        self._buffers.mark()
        self._staged.clear()
        self._saving = Future()
        save = Save(step=step, side=side, figures=figures or {}, origin=self._origin)
        work = (save, state, self._saving)
        if self.background:
            # A daemon, as it waits for other ranks: where one is lost the process has to end.
            threading.Thread(target=self._run, args=work, daemon=True).start()
        else:
            self._run(*work)
            self.drain()

    def wait_staged(self) -> None:
        """Returns when the state of the save under way may change."""
        self._staged.wait()

    def drain(self) -> Path | None:
        """Waits for the save under way; -> what the last one published, None if it was given up.

        Raises RuntimeError if it met with what is no fault of the file system.
        """
        try:
            return None if self._saving is None else self._saving.result()
        except OSError:
            return None  # told when it happened

    def finish(self) -> Path | None:
        """`drain` at the end of a run, which must not end without its last save.

        Raises TrainingError if that was given up.
        """
        path = self.drain()
        if path is None and self._saving is not None:
            raise TrainingError(str(self._saving.exception()))
        return path

    def settle(self) -> None:
        """Waits for the save under way, however it ends."""
        if self._saving is not None:
            wait([self._saving])

    def resolve(self, resume: str) -> Path | None:
        """The checkpoint to go on from, its files verified; None to start afresh.

        resume: "auto", the newest whole one here that the run did not go back behind, None if
        there are none at all; "none"; or the path of a checkpoint or of a run folder, unless what
        is saved here began there: then as "auto". Raises ConfigError if it leads to nothing whole.
        """
        self.drain()
        if resume == "none":
            return None
        return self._auto() if resume == "auto" else self._from(resume)

    def newest(self, *, last_step: float = math.inf) -> Path | None:
        """The newest whole one at `last_step` or before that the run did not go back behind."""
        self.drain()
        return self._newest(self._files, last_step)[0]

    def reader(self, path: Path) -> CheckpointReader:
        """Of a checkpoint that `resolve` gave; nothing is being saved any more."""
        self.drain()
        return CheckpointReader(path, self._ranks)

    def _run(self, save: Save, state: State, saving: Future[Path]) -> None:
        try:
            state = self._shares.own(state)
            if self.background:
                state = self._copied(state)
            path = save.run(state, self._files, self._ranks, self._keep)
        except OSError as error:
            line = f"step {save.step} is not saved: {error}"
            log.warning(line)
            saving.set_exception(OSError(line))
        except BaseException as error:
            saving.set_exception(error)
        else:
            log.info("saved %s", path)
            saving.set_result(path)
        finally:
            self._staged.set()

    def _copied(self, state: State) -> State:
        copies: list[State] = []

        def copy() -> None:
            try:
                copies.append(self._buffers.copy(state))
            finally:
                self._staged.set()

        self._ranks.together(copy)
        return copies[0]

    def _auto(self) -> Path | None:
        newest, faults = self._newest(self._files)
        if newest is None and faults:  # a fresh start would replace them, one by one
            raise ConfigError(
                f"{self.folder} holds checkpoints, none of them whole (the newest: {faults[0]}); "
                "allowed: to repair them or move them away, or another run_dir"
            )
        self._origin = None if newest is None else self._origin_of(newest)
        return newest

    def _from(self, resume: str) -> Path:
        path = Path(resume)
        self._origin = self._ranks.first(lambda: str(path.absolute()))
        own, _ = self._newest(self._files, origin=self._origin)
        if own is not None:
            line = "resume=%s: the run has gone on since; another run_dir starts there again"
            log.info(line, resume)
            return own
        if STEP.fullmatch(path.name):
            self._verify(path)
            return path
        newest, _ = self._newest(CheckpointFolder(path / "checkpoints"))
        if newest is None:
            raise ConfigError(
                f"resume={resume}: no complete checkpoint there; allowed: auto, none, the path of "
                "a checkpoint step_00000100 or of a run_dir that has one"
            )
        return newest

    def _newest(
        self, files: CheckpointFolder, last_step: float = math.inf, *, origin: str | None = None
    ) -> tuple[Path | None, list[str]]:
        """The newest whole one, and what is wrong with each that is newer.

        origin: none is looked for behind one of another.
        """
        faults = []
        for step in self._ranks.first(files.candidates):
            path = files.checkpoint(step)
            if step > last_step:
                continue
            try:
                if origin is not None and self._origin_of(path) != origin:
                    break
                self._verify(path)
            except ConfigError as error:
                log.warning("skipping checkpoint %s: %s", path.name, error)
                faults.append(str(error))
            else:
                return path, faults
        return None, faults

    def _origin_of(self, path: Path) -> str | None:
        """Checkpoints that are older than this fact have none."""
        return self._ranks.first(lambda: read_manifest(path).get("origin"))

    def _verify(self, path: Path) -> None:
        """Raises ConfigError unless all files are as they were written; each rank reads a share."""
        files = self._ranks.first(lambda: read_manifest(path)["files"])
        largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        share = largest_first[self._ranks.rank :: self._ranks.count]
        self._ranks.together(lambda: check_files(path, files, share))
