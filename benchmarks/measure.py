"""Time and memory of a repeated step, and the matrix rate that it is held against."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.job import Result
from benchmarks.load import busy_seconds
from trainer.metrics import peak_memory_gib


def measure(step: Callable[[], Tensor], *, repeats: int, device: torch.device) -> Result:
    """A warm step, then the median of `repeats`.

    -> seconds, their fastest and slowest, loss (what the warm step returned), rest_gib (memory
    before it), peak_gib, growth_gib (their difference), own_cores and other_cores: what this and
    other processes used meanwhile, on average; with more than a tenth of one for others the times
    are not to be trusted.
    """
    rest = _memory_gib(device)
    loss = float(step())
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    seconds = [timed(step, device) for _ in range(repeats)]
    elapsed = time.perf_counter() - start
    own = time.process_time() - own
    others = busy_seconds() - busy - own
    peak = peak_memory_gib(device)
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "loss": loss,
        "rest_gib": rest,
        "peak_gib": peak,
        "growth_gib": peak - rest,
        "own_cores": own / elapsed,
        "other_cores": max(others / elapsed, 0.0),
    }


def timed(step: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one step, on CUDA until the device is done with it."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def kept_bytes(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `forward` returns, and the bytes that it has made and that live on with it."""
    with _Made() as made, torch.enable_grad():
        output = forward()
    return output, made.alive()


class _Made(TorchDispatchMode):
    """The storages that operations return and have not been given."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), given=True)
        output = func(*args, **(kwargs or {}))
        self._note(output, given=False)
        return output

    def _note(self, tensors: Any, *, given: bool) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                self._sizes.setdefault(ref.cdata, (ref, 0 if given else storage.nbytes()))

    def alive(self) -> int:
        gc.collect()
        return sum(size for ref, size in self._sizes.values() if not ref.expired())


def matmul_flops(dtype: str, device: str) -> float:
    """FLOP/s of the best of ten square matrix products: 2048^3, on CUDA 8192^3."""
    size = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, dtype=kind, device=device)
    out = torch.empty_like(a)
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(10))


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _memory_gib(device: torch.device) -> float:
    """Held now: allocated on CUDA, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
