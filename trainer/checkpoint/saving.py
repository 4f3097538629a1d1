"""One save, from the state of every rank to a published checkpoint."""

import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.collectives import LostRankError
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.keep import Figures, Keep
from trainer.checkpoint.manifest import Files
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.shards import local_bytes, write_shards, write_side_files
from trainer.engine import State

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Save:
    """side: this rank's further files, by name; figures: of the evaluation at this step, if any;
    origin: the path of `resume` that the run began at, if it did at one."""

    step: int
    side: Mapping[str, bytes]
    figures: Figures
    origin: str | None

    def run(self, state: State, folder: CheckpointFolder, ranks: Ranks, keep: Keep) -> Path:
        """-> the checkpoint, published and on disk. Collective.

        state: what this rank writes. Raises OSError, on all ranks, for a fault of the file system
        on any; RuntimeError for any other. What is published stays untouched then.
        """
        try:
            needed = sum(ranks.together(lambda: local_bytes(state)))
            ranks.first(lambda: folder.reserve(self.step, needed))
            written = ranks.together(lambda: self._write(state, folder.draft(self.step), ranks))
            files = {name: facts for rank in written for name, facts in rank.items()}
            path = ranks.first(lambda: self._publish(folder, files, ranks))
        except LostRankError:
            raise  # others may still be writing
        except Exception:
            if ranks.rank == 0:
                shutil.rmtree(folder.draft(self.step), ignore_errors=True)
            raise
        if ranks.rank == 0:
            self._prune(folder, keep)
        return path

    def _write(self, state: State, draft: Path, ranks: Ranks) -> Files:
        return {**write_shards(draft, state, ranks), **write_side_files(draft, self.side)}

    def _publish(self, folder: CheckpointFolder, files: Files, ranks: Ranks) -> Path:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        facts = {"ranks": ranks.count, "figures": dict(self.figures), "versions": versions}
        folder.seal(self.step, files, origin=self.origin, **facts)
        path = folder.publish(self.step)
        folder.point(path)
        return path

    def _prune(self, folder: CheckpointFolder, keep: Keep) -> None:
        try:
            folder.prune(self.step, keep)
        except OSError as error:
            log.warning("older checkpoints stay: %s: %s", error.filename, error.strerror)
