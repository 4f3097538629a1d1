"""The training loop: what one optimiser step is, and when to evaluate, save and stop."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from models.hybrid import HybridLM
from parallel.collectives import LostRankError, gather_objects, max_over_ranks, sum_over_ranks
from parallel.layout import TokenLayout
from parallel.mesh import Mesh
from trainer.batch import Batch
from trainer.checkpoint.store import CheckpointStore
from trainer.data import TrainStream
from trainer.engine import Engine
from trainer.errors import ConfigError, TrainingError
from trainer.metrics import Record, peak_memory_gib
from trainer.sharder import Sharder, digest

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the record of a step goes."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class _Prepared(NamedTuple):
    """A step before it is taken."""

    batches: list[Batch]
    layouts: list[TokenLayout]
    epoch: int
    state: dict  # of the stream behind it


@dataclass(kw_only=True)
class Trainer:
    """Trains the model of `engine` from behind `step` to `steps`, steps counted from 1.

    learning_rate: from the step to the rate; held_out: fresh evaluation batches of this data rank;
    sinks get every record before the step's checkpoint is published.
    """

    blueprint: HybridLM  # on the meta device, for what shapes alone tell
    engine: Engine
    mesh: Mesh
    stream: TrainStream
    sharder: Sharder | None = None  # where ranks share sequences
    store: CheckpointStore
    learning_rate: Callable[[int], float]
    steps: int
    step: int = 0
    grad_clip: float = math.inf
    router_bias_rate: float = 0.0
    save_every: int = 0
    config: str = ""  # of the run, for its checkpoints
    held_out: Callable[[], Iterable[Batch]] = list
    eval_every: int = 0
    eval_batches: int | None = None
    peak_flops: float | None = None
    sinks: list[Sink] = field(default_factory=list)
    _reader: Executor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _ahead: Future[_Prepared] | None = field(default=None, init=False)
    _read: dict | None = field(default=None, init=False)  # where the stream is behind this step

    def run(self) -> Path | None:
        """-> the last checkpoint written, None if there was no step to do.

        Raises TrainingError naming step and batch if loss or gradients are not finite; no
        parameter has changed then, and no file. A held-out loss that is not ends the run too.
        """
        try:
            while self.step < self.steps:
                record = self.train_step()
                if self._due(self.eval_every):
                    record["eval_loss"] = self._held_out_loss()
                for sink in self.sinks:
                    sink.log(record)
                if self._due(self.save_every) or self.step == self.steps:
                    self.save(eval_loss=record.get("eval_loss"))
            saved = self.store.finish()
            if saved is not None and self.sharder is not None:
                log.info(self.sharder.describe())
        except LostRankError:  # which a save under way waits for too
            raise
        except BaseException:
            self.store.settle()
            raise
        finally:
            for sink in self.sinks:
                sink.close()
        return saved

    def train_step(self) -> Record:
        """One optimiser step over the micro-batches of all ranks; -> its record."""
        start = time.perf_counter()
        ahead = self._ahead or self._reader.submit(self._prepare)
        batches, layouts, epoch, self._read = ahead.result()
        self._ahead = self._reader.submit(self._prepare)
        labels, tokens, context = self._count(batches, digest(layouts))
        losses = []
        for i, batch in enumerate(batches, start=1):
            last = i == len(batches)
            batch = batch.to(self.mesh.device)
            losses.append(self.engine.accumulate(batch, 1 / max(labels, 1), last=last))
        local = torch.stack(losses).double()
        loss = float(sum_over_ranks(local.sum(), self.mesh.group)) / max(labels, 1)
        norm = self.engine.clip_grad_norm(self.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop(loss, norm, batches, local)
        self.step += 1
        rate = self.learning_rate(self.step)
        self.store.wait_staged()
        self.engine.step(rate)
        self._balance_experts()
        seconds = time.perf_counter() - start
        flops = 3 * tokens * self.blueprint.flops_per_token(context / max(tokens, 1))
        achieved = flops / seconds / self.mesh.ranks
        record: Record = {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "tokens": labels,
            "tokens_per_second": labels / seconds,
            "tflops_per_device": achieved / 1e12,
            "mfu": None if self.peak_flops is None else achieved / self.peak_flops,
            "peak_memory_gib": peak_memory_gib(self.mesh.device),
            "seconds": seconds,
            "epoch": epoch,
        }
        if self.sharder is not None:
            self.sharder.count(layouts)
        if self.mesh.context is not None:
            received = torch.tensor(self.mesh.context.traffic.take().total())
            record["comm_bytes"] = int(max_over_ranks(received, self.mesh.group))
        return record

    def _held_out_loss(self) -> float | None:
        loss = self.evaluate()
        if loss is not None and not math.isfinite(loss):  # alike on all ranks
            raise TrainingError(f"step {self.step}: eval_loss {loss} on the held-out documents")
        return loss

    def evaluate(self) -> float | None:
        """Mean loss of a token of the held-out documents; None if there is none."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        labels = 0
        for batch in islice(self.held_out(), self.eval_batches):
            batch = batch if self.sharder is None else self.sharder(batch)
            total += self.engine.evaluate(batch.to(self.mesh.device))
            labels += batch.valid_labels
        if self.mesh.context is not None:
            self.mesh.context.traffic.take()  # a record has the bytes of its step only
        labels = int(sum_over_ranks(torch.tensor(labels), self.mesh.group))
        return float(sum_over_ranks(total, self.mesh.group)) / labels if labels else None

    def save(self, *, eval_loss: float | None = None) -> None:
        """Starts a checkpoint of this step; `store.finish` tells whether it was published."""
        progress = {"step": self.step, "stream": self._read or self.stream.state()}
        facts: dict[str, Any] = {"progress": progress, "config": self.config}
        self.store.save(self.step, self.engine.state(), eval_loss=eval_loss, **facts)

    def load(self, checkpoint: Path) -> None:
        """Goes on where the checkpoint was written."""
        reader = self.store.reader(checkpoint)
        self._ahead, self._read = None, None
        # First: names another tokenizer, not its shapes.
        self.stream.restore(reader.progress["stream"])
        reader.check(self.engine.state())
        self.engine.load(reader.fill)
        reader.restore_generators()
        self.step = reader.progress["step"]

    def _prepare(self) -> _Prepared:
        """Reads the next step and plans its layouts, while the step before it computes."""
        epoch, batches = self.stream.epoch, self.stream.next_step()
        layouts: list[TokenLayout] = []
        if self.sharder is not None:
            batches, layouts = self.sharder.step(batches)
        return _Prepared(batches, layouts, epoch, self.stream.state())

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _count(self, batches: list[Batch], plan: int) -> tuple[int, int, int]:
        """Labels, tokens and tokens seen, over micro-batches and ranks; on the host, so that no
        device is waited for.

        plan: a digest of what this rank knows that its context peers must know too. Raises
        ConfigError on every rank if one group's digests differ, as the next message would never
        arrive.
        """
        local = torch.zeros(3 + 2 * self.mesh.data_ranks, dtype=torch.int64)
        local[:3] = torch.tensor([_extent(batch) for batch in batches]).sum(0)
        own = 3 + 2 * self.mesh.data_rank
        local[own : own + 2] = torch.tensor([plan, plan**2])
        labels, tokens, context, *sums = sum_over_ranks(local, self.mesh.group).tolist()
        for data_rank, (total, squares) in enumerate(zip(sums[::2], sums[1::2], strict=True)):
            if squares * self.mesh.context_ranks != total**2:  # equal just if all terms are
                raise ConfigError(
                    f"step {self.step + 1}: the context ranks of data rank {data_rank} planned "
                    "different layouts; allowed: the same configuration, data and version on each"
                )
        return labels, tokens, context

    def _balance_experts(self) -> None:
        routers = self.engine.model.routers()
        if not routers:
            return
        counts = torch.cat([router.counts for router in routers])
        sum_over_ranks(counts, self.mesh.group)
        parts = counts.split([len(router.counts) for router in routers])
        for router, part in zip(routers, parts, strict=True):
            router.update_bias(part, self.router_bias_rate)
            router.counts.zero_()

    def _stop(self, loss: float, norm: float, batches: list[Batch], losses: Tensor) -> None:
        """Every rank sees the same loss and norm, so every rank gets here."""
        pairs = [(b.source, x) for b, x in zip(batches, losses.tolist(), strict=True)]
        everywhere = [pair for part in gather_objects(pairs, self.mesh.group) for pair in part]
        bad = [source for source, x in everywhere if not math.isfinite(x)]
        named = bad or [source for source, _ in everywhere]
        raise TrainingError(
            f"step {self.step + 1}: loss {loss}, grad_norm {norm} in batch {'; '.join(named)}"
        )


def _extent(batch: Batch) -> tuple[int, int, int]:
    """Labels, tokens, and tokens seen by these tokens, themselves included; without padding."""
    runs = [f for row in batch.info.fragments for f in row if not f.padding]
    tokens = sum(f.length for f in runs)
    context = sum(f.length * f.position + f.length * (f.length + 1) // 2 for f in runs)
    return batch.valid_labels, tokens, context
