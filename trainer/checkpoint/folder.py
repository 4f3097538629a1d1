"""The folder of a run's checkpoints as files: what one process does with it.

step_00000100/    a checkpoint, there as a whole or not at all
.step_00000200/   a draft of one, or what is left of one that was given up
latest            the name of the checkpoint published last, replaced in one piece
"""

import errno
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

from trainer.checkpoint.keep import Keep
from trainer.checkpoint.manifest import (
    Files,
    read_manifest,
    sync_folder,
    write_durably,
    write_manifest,
)
from trainer.errors import ConfigError

log = logging.getLogger(__name__)

STEP = re.compile(r"step_(\d{8,})")


class CheckpointFolder:
    """`reserve`, `seal`, `publish`, `point` and `prune` are the phases of a save, in this order.

    Killed anywhere in between, the folder holds the checkpoints it held, or one more.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def checkpoint(self, step: int) -> Path:
        return self.path / f"step_{step:08}"

    def draft(self, step: int) -> Path:
        return self.path / f".step_{step:08}"

    def reserve(self, step: int, needed: int) -> None:
        """Makes an empty draft, and sweeps away those that were left.

        Raises OSError without as many free bytes as are needed: filling the disk would also end
        what else is written there.
        """
        self.sweep()
        self.draft(step).mkdir(parents=True)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            reason = f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} free"
            raise OSError(errno.ENOSPC, reason, str(self.path))

    def sweep(self) -> None:
        for left in self.path.glob(".step_*"):
            shutil.rmtree(left)

    def seal(self, step: int, files: Files, **facts: Any) -> None:
        """Writes the draft's manifest: its files, the facts, and how many were published before."""
        before = [number for number in self._published().values() if number is not None]
        write_manifest(
            self.draft(step), files, step=step, number=1 + max(before, default=0), **facts
        )
        sync_folder(self.draft(step))

    def publish(self, step: int) -> Path:
        """Gives the draft its name."""
        path = self.checkpoint(step)
        if path.exists():  # damaged, or of a future that the run left
            path.rename(self.path / f".{path.name}.replaced")
        self.draft(step).rename(path)
        sync_folder(self.path)
        return path

    def point(self, path: Path) -> None:
        """Makes `latest` name it."""
        staged = self.path / ".latest"
        write_durably(staged, f"{path.name}\n".encode())
        staged.replace(self.path / "latest")
        sync_folder(self.path)

    def prune(self, step: int, keep: Keep) -> None:
        """Removes what no rule keeps, now that `step` is published.

        Steps ahead of it are of a future that the run left; they stay and do not count.
        """
        figures = {s: self._fact(s, "figures") or {} for s in self.steps() if s <= step}
        for surplus in sorted(keep.surplus(figures) - {step}):
            path = self.checkpoint(surplus)
            path.rename(self.path / f".{path.name}.pruned")  # never seen half removed
        self.sweep()

    def steps(self) -> list[int]:
        """Of the published checkpoints, in ascending order."""
        matches = (STEP.fullmatch(path.name) for path in self.path.glob("step_*"))
        return sorted(int(match[1]) for match in matches if match)

    def candidates(self) -> list[int]:
        """Steps of checkpoints to go on from, best first, their files not yet looked at.

        A step ahead of another that was published after it is of a future that the run left. One
        line says so of each, also of drafts and of a pointer that is not right.
        """
        for left in sorted(self.path.glob(".step_*")):
            log.warning("skipping %s: it was never completed", left)
        published = self._published()
        pointed = self._pointed()
        numbers = {step: -1.0 if n is None else n for step, n in published.items()}
        if pointed is not None and published[pointed] is None:
            numbers[pointed] = math.inf  # its manifest is damaged; the pointer vouches for it
        if pointed is not None and numbers[pointed] < max(numbers.values()):
            log.warning("%s is behind the checkpoint published last", self.path / "latest")
        found = []
        for step, own in reversed(published.items()):
            if own is not None and any(n > own for s, n in numbers.items() if s < step):
                name = self.checkpoint(step).name
                log.warning("skipping checkpoint %s: the run went back behind it", name)
            else:
                found.append(step)
        return found

    def _published(self) -> dict[int, int | None]:
        """How many were published before each step, itself included; None if unreadable."""
        return {step: self._fact(step, "number") for step in self.steps()}

    def _pointed(self) -> int | None:
        """The step that `latest` names, None if there is no such checkpoint."""
        pointer = self.path / "latest"
        if not pointer.exists():
            return None
        try:
            match = STEP.fullmatch(pointer.read_text(errors="replace").removesuffix("\n"))
        except OSError:
            match = None
        if match and int(match[1]) in self.steps():
            return int(match[1])
        log.warning("%s is damaged: it names no checkpoint that is there", pointer)
        return None

    def _fact(self, step: int, name: str) -> Any:
        try:
            return read_manifest(self.checkpoint(step))[name]
        except (ConfigError, KeyError):
            return None
