"""One rank of a run whose third save is killed, with our store and with Accelerate's."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from trainer.checkpoint.keep import Keep
from trainer.checkpoint.store import CheckpointStore

EVERY, KILLED, STEPS = 2, 6, 8  # saves at 2, 4, 6, 8


class Subject(Protocol):
    """Owns model and optimiser, and how they are saved; `resume` -> the step that it goes on from,
    0 at the start."""

    def loss(self, x: Tensor) -> Tensor: ...
    def step(self, loss: Tensor) -> None: ...
    def save(self, step: int) -> None: ...
    def resume(self) -> int: ...


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(512, 2048), nn.GELU(), nn.Dropout(0.1), nn.Linear(2048, 512)]
    return nn.Sequential(*layers, nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))


class Ours:
    def __init__(self, run_dir: Path, *, background: bool) -> None:
        self._model = DistributedDataParallel(make_model())
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._store = CheckpointStore(
            run_dir,
            keep=Keep(newest=2),
            group=dist.new_group(backend="gloo"),
            background=background,
        )

    def loss(self, x: Tensor) -> Tensor:
        return self._model(x).square().mean()

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self._store.wait_staged()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, step: int) -> None:
        self._store.save(step, self._state(), progress={"step": step}, config="")
        if step == STEPS:
            self._store.finish()

    def resume(self) -> int:
        path = self._store.resolve("auto")
        if path is None:
            return 0
        reader, state = self._store.reader(path), self._state()
        reader.check(state)
        reader.fill(state)
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        whole = get_optimizer_state_dict(self._model, self._optimizer, options=options)
        whole.update(state["optimizer"])
        set_optimizer_state_dict(self._model, self._optimizer, whole, options=options)
        reader.restore_generators()
        return reader.progress["step"]

    def _state(self) -> dict:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optimizer = get_optimizer_state_dict(self._model, self._optimizer, options=options)
        tensors = {name: x for name, x in optimizer.items() if name.startswith("state.")}
        return {"model": self._model.module.state_dict(), "optimizer": tensors}


class Accelerates:
    """As its documentation has it: automatic names, of which two are kept."""

    def __init__(self, run_dir: Path) -> None:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        project = ProjectConfiguration(
            project_dir=str(run_dir), automatic_checkpoint_naming=True, total_limit=2
        )
        self._accelerator = Accelerator(cpu=True, project_config=project)
        assert self._accelerator.num_processes == dist.get_world_size()
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters())
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._folder = run_dir / "checkpoints"

    def loss(self, x: Tensor) -> Tensor:
        return self._model(x).square().mean()

    def step(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, step: int) -> None:
        self._accelerator.save_state()
        self._accelerator.wait_for_everyone()

    def resume(self) -> int:
        numbers = [int(path.name.split("_")[1]) for path in self._folder.glob("checkpoint_*")]
        if not numbers:
            return 0
        self._accelerator.load_state()
        self._accelerator.project_configuration.iteration = max(numbers) + 1
        return EVERY * (max(numbers) + 1)


SUBJECTS = {
    "longhaul sync": lambda run_dir: Ours(run_dir, background=False),
    "longhaul background": lambda run_dir: Ours(run_dir, background=True),
    "accelerate": Accelerates,
}


def rank_of_a_run(
    name: str, run_dir: Path, folder: Path, rank: int, ranks: int, delay: float | None
) -> None:
    """One process: trains to the end, or is killed `delay` seconds into the third save."""
    code = 1
    try:
        sys.stderr = (folder / f"errors{rank}").open("w", buffering=1)
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # read, and not used
        place, seconds = f"file://{folder}/store", timedelta(seconds=30)
        dist.init_process_group("gloo", place, rank=rank, world_size=ranks, timeout=seconds)
        _train(SUBJECTS[name](run_dir), folder, rank, ranks, delay)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _train(subject: Subject, folder: Path, rank: int, ranks: int, delay: float | None) -> None:
    torch.manual_seed(rank)  # of the dropout
    first = subject.resume()
    (folder / f"resumed{rank}").write_text(str(first))
    with (folder / f"losses{rank}").open("w", buffering=1) as losses:
        for step in range(first + 1, STEPS + 1):
            generator = torch.Generator().manual_seed(step * ranks + rank)
            loss = subject.loss(torch.randn(16, 512, generator=generator))
            subject.step(loss)
            losses.write(f"{step} {float(loss)!r}\n")
            if step % EVERY:
                continue
            start = time.perf_counter()
            if step == KILLED and delay is not None and rank == 0:
                threading.Timer(delay, _kill_all, (folder, ranks)).start()
            subject.save(step)
            if step == STEPS:
                (folder / f"span{rank}").write_text(str(time.perf_counter() - start))
    dist.barrier()


def _kill_all(folder: Path, ranks: int) -> None:
    for rank in reversed(range(ranks)):  # itself, rank 0, last
        os.kill(int((folder / f"pid{rank}").read_text()), signal.SIGKILL)
