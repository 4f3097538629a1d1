"""Time and memory of a repeated step, and the matrix rate that it is held against."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

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
