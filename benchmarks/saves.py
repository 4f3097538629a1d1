"""The process of one measurement of saves: training steps of a model, some with a save behind."""

import math
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.job import Job, Result
from benchmarks.load import busy_seconds
from benchmarks.measure import timed
from benchmarks.subjects import initialised_model, random_batch
from trainer.checkpoint.manifest import write_durably
from trainer.checkpoint.store import CheckpointStore
from trainer.construct import construct
from trainer.engine import State
from trainer.loss import LanguageModelLoss
from trainer.metrics import peak_memory_gib


def measure_saves(job: Job) -> Result:
    """Medians: seconds of a step without a save; for `sync` and `background` saves stall_seconds
    (in which the training thread stands still), lost_seconds (by which the steps until the end of
    the save, and beyond, took longer) and save_seconds; plain_seconds, in which a plain file of as
    many bytes is written and synced. peak_gib includes the copies of background saves."""
    training = _Training(job)
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            mode: CheckpointStore(Path(folder, mode), background=mode == "background")
            for mode in ("sync", "background")
        }
        training.step(stores["sync"])
        busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
        device = torch.device(job.device)
        steps = [timed(lambda: training.step(stores["sync"]), device) for _ in range(job.repeats)]
        result: Result = {"seconds": statistics.median(steps)}
        ahead = 1
        for mode, store in stores.items():
            first, *saves = [
                training.save(store, number, ahead, result["seconds"])
                for number in range(job.repeats + 1)  # the first makes the buffers
            ]
            result[mode] = {key: statistics.median(s[key] for s in saves) for key in first}
            ahead = 1 + math.ceil(3 * result[mode]["save_seconds"] / result["seconds"])
        elapsed, own = time.perf_counter() - start, time.process_time() - own
        checkpoint = stores["sync"].finish()
        assert checkpoint is not None
        data = b"\1" * sum(path.stat().st_size for path in checkpoint.iterdir())
        result["plain_seconds"] = timed(lambda: write_durably(Path(folder, "plain"), data), "cpu")
    return result | {
        "bytes": len(data),
        "state_bytes": sum(x.nbytes for part in training.state().values() for x in part.values()),
        "peak_gib": peak_memory_gib(device),
        "other_cores": max((busy_seconds() - busy - own) / elapsed, 0.0),
    }


class _Training:
    """A model of the job on one random row, with the optimiser that its configuration names."""

    def __init__(self, job: Job) -> None:
        assert job.config is not None
        self._device = torch.device(job.device)
        self._model = initialised_model(
            job.config, seed=job.seed, device=job.device, dtype=job.dtype
        )
        self._optimizer = construct(job.config["optim"], "optim", model=self._model)
        autocast = torch.bfloat16 if job.dtype == "bf16" else None
        self._loss = LanguageModelLoss(self._model, autocast=autocast)
        self._batch = random_batch(job).to(job.device)
        self._waited = 0.0

    def step(self, store: CheckpointStore) -> None:
        (self._loss(self._batch) / self._batch.valid_labels).backward()
        start = time.perf_counter()
        store.wait_staged()
        self._waited += time.perf_counter() - start
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> State:
        """As an engine gives it."""
        named = self._model.named_parameters()
        slots = ((name, slot) for name, p in named for slot in self._optimizer.state[p].items())
        optimizer = {f"state.{name}.{key}": value for name, (key, value) in slots}
        return {"model": dict(self._model.state_dict()), "optimizer": optimizer}

    def save(
        self, store: CheckpointStore, number: int, steps: int, step_seconds: float
    ) -> dict[str, float]:
        """One save and the steps behind it."""
        self._waited = 0.0
        ends: list[float] = []

        def note_end() -> None:
            store.settle()
            ends.append(time.perf_counter())

        def save() -> None:
            store.save(number, self.state(), progress={}, config="")

        start = time.perf_counter()
        blocked = timed(save, self._device)
        watch = threading.Thread(target=note_end)
        watch.start()
        for _ in range(steps):
            timed(lambda: self.step(store), self._device)
        watch.join()
        return {
            "stall_seconds": blocked + self._waited,
            "lost_seconds": time.perf_counter() - start - steps * step_seconds,
            "save_seconds": ends[0] - start,
        }
