"""What shows a run to people elsewhere: tensorboard and wandb, without which it can go on."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from trainer.metrics import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


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
    """One wandb run over all resumptions: its id stands in the run folder."""

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: Literal["offline", "online"],
        project: str,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow",
            mode=mode,
            project=project,
            name=run_dir.name,
            dir=run_dir,
            config=dict(config),
        )

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        values = {k: v for k, v in record.items() if k != "step" and v is not None}
        self._run.log(values, step=step)

    def show(self, name: str, picture: Path, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(picture))}, step=step)

    def close(self) -> None:
        self._run.finish()
