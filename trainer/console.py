"""What a person sees: a header, a progress bar on a terminal, plain lines elsewhere, train.log."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from models.hybrid import HybridLM
from models.ops.select import Ops
from parallel.mesh import Mesh
from trainer.data.steps import RopeSetting, Stage
from trainer.engine import Memory
from trainer.metrics import Record
from trainer.settings import Numerics, Parallelism

log = logging.getLogger("trainer")

_OWN = "longhaul"  # marks the handlers that are ours to replace


class _AboveBar(logging.StreamHandler):
    """Writes lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:  # a reader that has gone, e.g. `| head`, does not end a run
            self.handleError(record)


def configure_logging(*, main: bool, stream: TextIO | None = None) -> None:
    """Lines of level INFO to `stream` (standard output) on the main process, none elsewhere."""
    close_logging()
    _add(_AboveBar(stream or sys.stdout) if main else logging.NullHandler(), "%(message)s")
    for name in ("trainer", "models", "parallel"):
        logging.getLogger(name).setLevel(logging.INFO if main else logging.CRITICAL)


def close_logging() -> None:
    """Takes our handlers away again: another run of this process brings its own."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.name == _OWN]:
        root.removeHandler(handler)
        handler.close()


def log_to_file(path: Path) -> None:
    """The same lines go to `path` from here on, with the time of each."""
    _add(logging.FileHandler(path), "%(asctime)s %(message)s")


def _add(handler: logging.Handler, pattern: str) -> None:
    handler.name = _OWN
    handler.setFormatter(logging.Formatter(pattern))
    logging.getLogger().addHandler(handler)


def header(
    config: Mapping[str, Any],
    model: HybridLM,
    stages: Sequence[Stage],
    *,
    mesh: Mesh,
    ops: Ops,
    numerics: Numerics,
    parallelism: Parallelism,
    memory: Memory,
    heap_kept: bool,
) -> list[str]:
    """What the run is made of."""
    total = sum(parameter.numel() for parameter in model.parameters())
    together = config["trainer"]["micro_batch_size"] * mesh.data_ranks
    context = [] if mesh.context is None else [f"context {parallelism.describe()}"]
    state = sum(memory) / 2**30
    heap = "; freed memory stays in the process" if heap_kept else ""
    return [
        f"model   {config['model']['name']}: {total / 1e6:,.1f} M parameters, "
        f"{model.active_parameters() / 1e6:,.1f} M active, {len(model.layers)} layers "
        f"[{', '.join(config['model']['pattern'])}]",
        f"mesh    {mesh.describe()}, {numerics.precision}",
        *context,
        *(f"tokens  {line}" for line in _tokens(stages, together)),
        f"ops     {ops.describe()}",
        f"memory  {state:.2f} GiB of parameters, gradients and optimiser state a rank{heap}",
    ]


def _tokens(stages: Sequence[Stage], together: int) -> Iterator[str]:
    """A line for each stage; together: rows of a micro-batch over all ranks."""
    first = 0
    for stage in stages:
        rows, seq_len = stage.batch_size, stage.seq_len
        behind = f"behind {first:,} steps " if first else ""
        rope = "" if stage.rope == RopeSetting() else f", {stage.rope}"
        yield (
            f"{behind}{rows} rows x {seq_len:,} = {rows * seq_len:,} a step, "
            f"{rows // together} micro-batches a rank{rope}"
        )
        first += stage.steps or 0


class Console:
    """Progress of a run: a line every `every` steps, and a bar where someone watches."""

    def __init__(self, *, steps: int, first: int, every: int) -> None:
        self._steps, self._every = steps, every
        watched = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=first, disable=not watched, unit="step")

    def log(self, record: Record) -> None:
        step = int(record["step"] or 0)
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(loss=_number(record["loss"], ".4f"))
        if step % self._every == 0 or step == self._steps or any(map(_told, record)):
            log.info(format_line(record, self._steps))

    def close(self) -> None:
        self._bar.close()


def format_line(record: Record, steps: int) -> str:
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {_number(record['loss'], '.4f')}",
        f"grad_norm {_number(record['grad_norm'], '.3f')}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['tflops_per_device']:.3g} TFLOP/s",
        f"{record['peak_memory_gib']:.2f} GiB",
    ]
    if record.get("mfu") is not None:
        parts.insert(-1, f"mfu {record['mfu']:.1%}")
    parts += [f"{name} {x:.4f}" for name, x in record.items() if _told(name) and x is not None]
    if (record.get("data_wait") or 0) >= 0.01:
        parts.append(f"waited for data {record['data_wait']:.1%}")
    if record.get("skipped"):
        parts.append("skipped")
    return "  ".join(parts)


def _told(name: str) -> bool:
    """Whether a figure of an evaluation is one of the few for the console."""
    return name == "eval_loss" or (
        name.startswith("eval_") and name.endswith("_accuracy") and "_token_" not in name
    )


def _number(x: float | None, form: str) -> str:
    return "not finite" if x is None else format(x, form)
