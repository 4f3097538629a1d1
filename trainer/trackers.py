"""What shows a run to people elsewhere: tensorboard and wandb, without which it can go on."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from trainer.errors import ConfigError
from trainer.metrics import Record
from trainer.run_folder import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

_WANDB_ID = "wandb_id"  # in the run folder


class Spared:
    """A tracker that does not end the run: after an error nothing more goes there."""

    def __init__(self, tracker: "TensorBoard | Wandb") -> None:
        self._tracker: TensorBoard | Wandb | None = tracker

    def log(self, record: Record) -> None:
        self._try("log", record)

    def show(self, name: str, picture: Path, step: int) -> None:
        self._try("show", name, picture, step)

    def close(self) -> None:
        self._try("close")

    def _try(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            name = type(self._tracker).__name__.lower()
            log.warning("%s: %s; nothing more goes there until the next start", name, error)
            self._tracker = None


class TensorBoard:
    """Event files in run_dir/tensorboard: one for each time that the run starts or goes back, which
    hides what others hold of the steps from there on."""

    def __init__(self, run_dir: Path) -> None:
        self._folder, self._step = run_dir / "tensorboard", 0
        self._writer: SummaryWriter | None = None

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        writer = self._at(step)
        for name, value in record.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, step)
        self._step = step

    def show(self, name: str, picture: Path, step: int) -> None:
        from matplotlib.image import imread

        self._at(step).add_image(name, imread(picture), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.flush()  # raises what its thread met, where closing would not
            self._writer.close()

    def _at(self, step: int) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None or step <= self._step:
            self.close()
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            self._step = step - 1
        return self._writer


class Wandb:
    """One wandb run over all starts: its id stands in the run folder.

    Charts are over "step", for wandb's own count cannot go back where the run does. A run that was
    shown before and cannot be reached goes on offline; one that is new raises ConfigError.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Literal["offline", "online"],
        project: str,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        known = _wandb_id(run_dir)
        own = known or uuid4().hex[:8]
        start = functools.partial(
            wandb.init,
            id=own,
            resume="allow",
            project=project,
            name=run_dir.name,
            dir=run_dir,
            config=dict(config),
        )
        try:
            self._run = start(mode=mode)
        except wandb.Error as error:
            if not known:
                raise _refusal(mode, error) from error
            log.warning("%s; offline until the next start", _line(mode, error))
            wandb.teardown()  # which holds the id
            self._run = start(mode="offline")
        if not known:
            write_whole(run_dir / _WANDB_ID, own)
        self._run.define_metric("*", step_metric="step")
        self._row = self._run.step  # of wandb, the next one

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        self._log(step, {k: v for k, v in record.items() if v is not None})
        self._row = max(step, self._row) + 1

    def show(self, name: str, picture: Path, step: int) -> None:
        import wandb

        self._log(step, {"step": step, name: wandb.Image(str(picture))})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=max(step, self._row))


def check_wandb_login(run_dir: Path) -> None:
    """Raises ConfigError for a run that is new and has no key or no connection, see `Wandb`."""
    import wandb

    if _wandb_id(run_dir):
        return
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise _refusal("online", error) from error


def _wandb_id(run_dir: Path) -> str:
    """Empty for a run that is new to wandb."""
    file = run_dir / _WANDB_ID
    return file.read_text().strip() if file.exists() else ""


def _line(mode: str, error: Exception) -> str:
    return f"logging.wandb={mode}: {' '.join(str(error).split()).rstrip('.')}"


def _refusal(mode: str, error: Exception) -> ConfigError:
    allowed = "off, offline, or online behind `wandb login`"
    return ConfigError(f"{_line(mode, error)}; allowed: {allowed}")
