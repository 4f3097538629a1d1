"""The training loop: what one optimiser step is, and when to evaluate, save and stop."""

import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from models.hybrid import HybridLM
from parallel.collectives import LostRankError, gather_objects, max_over_ranks, sum_over_ranks
from parallel.mesh import Mesh
from trainer.batch import Batch
from trainer.checkpoint.store import CheckpointStore
from trainer.data.steps import RopeSetting
from trainer.engine import Engine
from trainer.errors import ConfigError, TrainingError
from trainer.evals.suite import Suite
from trainer.evals.task import finite
from trainer.guard import Fault, Guard
from trainer.loader import Loader, Prepared
from trainer.metrics import Record, peak_memory_gib
from trainer.sharder import digest
from trainer.shares import routed_imbalance, softmax_shares
from trainer.signals import StopSignals

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the record of a step goes."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Gallery(Protocol):
    """A sink that takes the pictures of an evaluation too, ahead of the record of its step."""

    def show(self, name: str, picture: Path, step: int) -> None: ...


class _AskedToStop(Exception):
    """By a signal, in an evaluation."""


@dataclass(kw_only=True)
class Trainer:
    """Trains the model of `engine` from behind `step` to `steps`, steps counted from 1.

    learning_rate: from the step to the rate; suite: what is evaluated every `eval_every` steps;
    sinks get every record before the step's checkpoint is published. `signals` of any rank end the
    run between two steps, `stopped_by` says which then. `beat` is told wherever the run goes on.
    """

    blueprint: HybridLM  # on the meta device, for what shapes alone tell
    engine: Engine
    mesh: Mesh
    loader: Loader
    store: CheckpointStore
    learning_rate: Callable[[int], float]
    steps: int
    step: int = 0
    grad_clip: float = math.inf
    router_bias_rate: float = 0.0
    save_every: int = 0
    config: str = ""  # of the run, for its checkpoints
    suite: Suite | None = None
    eval_every: int = 0
    peak_flops: float | None = None
    sinks: list[Sink] = field(default_factory=list)
    guard: Guard = field(default_factory=Guard)
    bad_batches: Path | None = None  # a line of JSON for each step that `guard` refused
    signals: StopSignals = field(default_factory=StopSignals)
    beat: Callable[[int], None] = lambda step: None
    stopped_by: str | None = field(default=None, init=False)
    _reader: Executor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _ahead: Future[Prepared] | None = field(default=None, init=False)
    _read: dict | None = field(default=None, init=False)  # where the stream is behind this step
    _rope: RopeSetting = field(default=RopeSetting(), init=False)  # of the last step
    _saved: int | None = field(default=0, init=False)  # the step on disk if it is as it is here

    def run(self) -> Path | None:
        """-> the last checkpoint written, None if there was no step to do.

        Raises TrainingError naming step and batch where `guard` says stop; no parameter has
        changed then. A held-out loss that is not finite ends the run too.
        """
        try:
            while self.step < self.steps and self.stopped_by is None:
                record = self.train_step()
                if record is None:
                    continue
                figures = self.evaluate() if self._due(self.eval_every) else {}
                for sink in self.sinks:
                    sink.log(record | figures)
                if self._due(self.save_every) or self.step == self.steps:
                    self.save(figures=figures)
            if self._asked_to_stop() and self.step != self._saved:
                self.save()
            self.beat(self.step)
            saved = self.store.finish()
            if saved is not None and self.loader.sharder is not None:
                log.info(self.loader.sharder.describe())
        except LostRankError:  # which a save under way waits for too
            raise
        except BaseException:
            self.store.settle()
            raise
        finally:
            self.loader.close()
            for sink in self.sinks:
                sink.close()
        return saved

    def train_step(self) -> Record | None:
        """One optimiser step over the micro-batches of all ranks; -> its record.

        None if there was none: a signal asks to stop, or the run went back to a checkpoint.
        """
        start = time.perf_counter()
        ahead = self._ahead or self._reader.submit(self.loader.next)
        batches, layouts, epoch, rope, read = ahead.result()
        waited = time.perf_counter() - start
        self.beat(self.step)  # a rank whose storage does not answer is now behind the others
        labels, tokens, context, asked = self._count(batches, digest(layouts))
        if asked:
            self._heed()
            self._ahead = ahead
            return None
        self._ahead, self._read = self._reader.submit(self.loader.next), read
        self._set_rope(rope)
        local = self._accumulate(batches, labels)
        loss = float(sum_over_ranks(local.sum(), self.mesh.group)) / max(labels, 1)
        parts = self._parts(labels)
        norm = self.engine.clip_grad_norm(self.grad_clip)
        fault = self.guard.judge(loss, norm)
        if fault is not None:
            self._report(fault, loss, norm, batches, local)
            self._drop()
            if fault.action == "rollback":
                self._go_back()
                return None
        self.step += 1
        rate = self.learning_rate(self.step)
        shares: Record = {}
        if fault is None:
            self.store.wait_staged()
            self.engine.step(rate)
            shares = self._balance_routers()
        seconds = time.perf_counter() - start
        record: Record = {
            "step": self.step,
            "loss": _finite(loss),
            "grad_norm": _finite(norm),
            "lr": rate,
            **parts,
            **self._speed(labels, tokens, context, seconds),
            "peak_memory_gib": peak_memory_gib(self.mesh.device),
            "seconds": seconds,
            "data_wait": waited / seconds,
            "epoch": epoch,
            **shares,
        }
        if fault is not None:
            record["skipped"] = True
        if self.loader.sharder is not None:
            self.loader.sharder.count(layouts)
        if self.mesh.context is not None:
            received = torch.tensor(self.mesh.context.traffic.take().total())
            record["comm_bytes"] = int(max_over_ranks(received, self.mesh.group))
            record |= routed_imbalance(self.engine.model, self.mesh)
        return record

    def _set_rope(self, rope: RopeSetting) -> None:
        """Of the stage; compiled layers are compiled anew where it changes."""
        if rope != self._rope:
            self.engine.model.set_rope(base=rope.base, factor=rope.factor)
            log.info("step %d: %s", self.step + 1, rope)
        self._rope = rope

    def _accumulate(self, batches: list[Batch], labels: int) -> Tensor:
        """[micro-batches], the loss sum of each."""
        losses = []
        for i, batch in enumerate(batches, start=1):
            self.beat(self.step)
            last = i == len(batches)
            batch = batch.to(self.mesh.device)
            losses.append(self.engine.accumulate(batch, 1 / max(labels, 1), last=last))
        return torch.stack(losses).double()

    def _parts(self, labels: int) -> Record:
        """What the loss is made of, means over the labels of the step."""
        sums = self.engine.loss.take_sums()
        if not sums:
            return {}
        total = sum_over_ranks(torch.stack([*sums.values()]), self.mesh.group) / max(labels, 1)
        return {name: _finite(x) for name, x in zip(sums, total.tolist(), strict=True)}

    def _speed(self, labels: int, tokens: int, context: int, seconds: float) -> Record:
        seen = context / max(tokens, 1)
        flops = tokens * self.engine.loss.flops_per_token(self.blueprint, seen)
        achieved = flops / seconds / self.mesh.ranks
        return {
            "tokens": labels,
            "tokens_per_second": labels / seconds,
            "tflops_per_device": achieved / 1e12,
            "mfu": None if self.peak_flops is None else achieved / self.peak_flops,
        }

    def evaluate(self) -> Record:
        """The figures of the suite on the parameters as they are; none if a signal asks to stop.

        Raises TrainingError if the held-out loss is not finite.
        """
        if self.suite is None:
            return {}
        try:
            figures, pictures = self.suite.run(self.step, self._before_scoring)
        except _AskedToStop:
            return {}
        finally:
            if self.mesh.context is not None:
                self.mesh.context.traffic.take()  # a record has the bytes of its step only
        loss = figures.get("eval_loss")
        if loss is not None and not math.isfinite(loss):  # alike on all ranks
            raise TrainingError(f"step {self.step}: eval_loss {loss} on the held-out documents")
        galleries = [sink for sink in self.sinks if isinstance(sink, Gallery)]
        for (name, picture), gallery in product(pictures.items(), galleries):
            gallery.show(f"eval_{name}", picture, self.step)
        return finite(figures)

    def _before_scoring(self) -> None:
        self.beat(self.step)
        if self._asked_to_stop():
            raise _AskedToStop

    def save(self, *, figures: Record | None = None) -> None:
        """Starts a checkpoint of this step, with the figures of its evaluation; `store.finish`
        tells whether it was published."""
        self.beat(self.step)
        progress = {
            "step": self.step,
            "stream": self._read or self.loader.stream.state(),
            "guard": self.guard.state(),
            "rope": asdict(self._rope),
        }
        facts: dict[str, Any] = {"progress": progress, "config": self.config}
        self.store.save(self.step, self.engine.state(), figures=figures, **facts)
        self._saved = self.step
        self.beat(self.step)

    def load(self, checkpoint: Path) -> None:
        """Goes on where the checkpoint was written."""
        reader = self.store.reader(checkpoint)
        if self._ahead is not None:
            self._ahead.result()  # moves the stream
        self._ahead, self._read = None, None
        progress = reader.progress
        self.loader.restore(progress["stream"])  # first: names another tokenizer, not its shapes
        reader.check(self.engine.state())
        self.engine.load(reader.fill)
        reader.restore_generators()
        self._set_rope(RopeSetting(**progress.get("rope", {})))
        if "guard" in progress:  # older checkpoints have none
            self.guard.restore(progress["guard"])
        self.step = self._saved = progress["step"]

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _count(self, batches: list[Batch], plan: int) -> tuple[int, int, int, int]:
        """Labels, tokens and tokens seen, over micro-batches and ranks, and the ranks that a signal
        asks to stop; on the host, so that no device is waited for.

        plan: a digest of what this rank knows that its context peers must know too. Raises
        ConfigError on every rank if one group's digests differ, as the next message would never
        arrive.
        """
        local = torch.zeros(4 + 2 * self.mesh.data_ranks, dtype=torch.int64)
        local[:3] = torch.tensor([_extent(batch) for batch in batches]).sum(0)
        local[3] = self.signals.noted is not None
        own = 4 + 2 * self.mesh.data_rank
        local[own : own + 2] = torch.tensor([plan, plan**2])
        labels, tokens, context, asked, *sums = sum_over_ranks(local, self.mesh.group).tolist()
        for data_rank, (total, squares) in enumerate(zip(sums[::2], sums[1::2], strict=True)):
            if squares * self.mesh.context_ranks != total**2:  # equal just if all terms are
                raise ConfigError(
                    f"step {self.step + 1}: the context ranks of data rank {data_rank} planned "
                    "different layouts; allowed: the same configuration, data and version on each"
                )
        return labels, tokens, context, asked

    def _asked_to_stop(self) -> bool:
        """By a signal to any of the ranks, now or before."""
        if self.stopped_by is None:
            noted = torch.tensor(self.signals.noted is not None, dtype=torch.int64)
            if sum_over_ranks(noted, self.mesh.group):
                self._heed()
        return self.stopped_by is not None

    def _heed(self) -> None:
        signals = gather_objects(self.signals.noted, self.mesh.group)
        self.stopped_by = next(name for name in signals if name)
        log.info("%s: stopping behind step %d", self.stopped_by, self.step)

    def _balance_routers(self) -> Record:
        """Moves the routers' biases by the loads of the step; -> the shares these are."""
        routers = self.engine.model.routers()
        if not routers:
            return {}
        counts = torch.cat([router.counts for router in routers])
        sum_over_ranks(counts, self.mesh.group)
        loads = dict(zip(routers, counts.split([len(r.counts) for r in routers]), strict=True))
        for router, load in loads.items():
            router.update_bias(load, self.router_bias_rate)
            router.counts.zero_()
        return softmax_shares(self.engine.model, loads)

    def _report(
        self, fault: Fault, loss: float, norm: float, batches: list[Batch], losses: Tensor
    ) -> None:
        """Leaves the batches of a step in a file and the log; raises TrainingError if it ends the
        run. Every rank sees the same loss and norm, so every rank gets here."""
        pairs = [(b.source, x) for b, x in zip(batches, losses.tolist(), strict=True)]
        parts = gather_objects(pairs, self.mesh.group)
        everywhere = [pair for part in parts for pair in part]
        bad = [source for source, x in everywhere if not math.isfinite(x)]
        named = bad or [source for source, _ in everywhere]
        step = self.step + 1
        if self.mesh.main and self.bad_batches is not None:
            line: dict[str, object] = {"step": step, "action": fault.action, "reason": fault.reason}
            line |= {"loss": _finite(loss), "grad_norm": _finite(norm)}
            line["batches"] = [[source for source, _ in part] for part in parts]
            with self.bad_batches.open("a") as file:
                file.write(json.dumps(line) + "\n")
        told = f"step {step}: {fault.reason} in batch {'; '.join(named)}"
        if fault.action == "stop":
            raise TrainingError(told)
        log.warning("%s: %s", fault.action, told)

    def _drop(self) -> None:
        """Nothing is left of the gradients and loads of a step that is not taken."""
        self.engine.drop()
        for router in self.engine.model.routers():
            router.counts.zero_()

    def _go_back(self) -> None:
        """To a checkpoint; the data goes on behind the batch that was just seen."""
        limit = self.step + 1 - self.guard.rollback_steps
        read, rollbacks = self._read, self.guard.rollbacks + 1
        checkpoint = self.store.newest(last_step=limit)
        if checkpoint is None:
            raise TrainingError(
                f"step {self.step + 1}: no checkpoint to go back to at step {limit} or before"
            )
        self.load(checkpoint)
        assert read is not None
        self.loader.restore(read)
        self._read, self.guard.rollbacks = read, rollbacks
        self._saved = None  # its data goes on elsewhere
        if self.mesh.context is not None:
            self.mesh.context.traffic.take()
        log.warning("went back to %s; the data goes on behind the batch", checkpoint.name)


def _finite(x: float) -> float | None:
    """None for what JSON has no name for."""
    return x if math.isfinite(x) else None


def _extent(batch: Batch) -> tuple[int, int, int]:
    """Labels, tokens, and tokens seen by these tokens, themselves included; without padding."""
    runs = [f for row in batch.info.fragments for f in row if not f.padding]
    tokens = sum(f.length for f in runs)
    context = sum(f.length * f.position + f.length * (f.length + 1) // 2 for f in runs)
    return batch.valid_labels, tokens, context
