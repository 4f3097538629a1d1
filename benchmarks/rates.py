"""How fast each rank computes and each group communicates, and which rank falls behind."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.measure import timed
from parallel.collectives import Axis, barrier, sum_over_ranks

Scope = Literal["rank", "node", "all"]
BATCH_BYTES = 2**22  # small messages are sent several at a time, to outweigh the clock
MAX_BATCH = 20


@dataclass(frozen=True)
class Rate:
    """Repeated measurements of this rank.

    values: in `unit` per second; for messages of `size` bytes, what a rank receives at the least,
    so that numbers of ranks and kinds compare; seconds: of one call.
    """

    name: str
    scope: Scope
    unit: str
    values: list[float]
    seconds: list[float]
    size: int | None = None
    individual: bool = True  # a slow rank shows in its own values, not in everyone's


def compute_rates(
    device: torch.device, *, matmul_size: int, memory_mib: int, repeats: int
) -> Iterator[Rate]:
    """Matrix products, and the memory's bandwidth: a copy reads and writes."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, matmul_size, matmul_size, dtype=dtype, device=device)
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        yield _rate(f"matmul {name}", "TFLOP", 2 * matmul_size**3 / 1e12, product, repeats, device)
    x = torch.zeros(memory_mib * 2**20, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(x).copy_, x)
    yield _rate("memory", "GB", 2 * x.numel() / 1e9, copy, repeats, device)


def _rate(
    name: str,
    unit: str,
    amount: float,
    step: Callable[[], object],
    repeats: int,
    device: torch.device,
) -> Rate:
    step()
    seconds = [timed(step, device) for _ in range(repeats)]
    return Rate(name, "rank", unit, [amount / s for s in seconds], seconds)


def link_rates(
    axis: Axis, device: torch.device, *, scope: Scope, sizes: Sequence[int], repeats: int
) -> Iterator[Rate]:
    """Every collective that training uses, over the ranks of an axis."""
    for size in sizes:
        for kind, (call, share) in _calls(axis, device, size).items():
            call()
            batch = max(1, min(MAX_BATCH, BATCH_BYTES // size))
            seconds = [_batch_seconds(axis, device, call, batch) for _ in range(repeats)]
            values = [share * size / 1e9 / s for s in seconds]
            own = scope == "node" or kind == "shift"
            yield Rate(kind, scope, "GB", values, seconds, size, own)


def _calls(
    axis: Axis, device: torch.device, size: int
) -> dict[str, tuple[Callable[[], object], float]]:
    """Each collective on a message of `size` bytes, and the share of it that a rank receives."""
    n = axis.ranks
    part = torch.zeros(max(1, size // (4 * n)), device=device)
    whole = torch.zeros(n * len(part), device=device)
    counts = [len(part)] * n
    name: dict[str, Any] = {"op": "preflight", "direction": "forward"}
    return {
        "all_reduce": (lambda: sum_over_ranks(whole, axis.group), 2 * (n - 1) / n),
        "all_gather": (lambda: axis.gather(part, **name).wait(), (n - 1) / n),
        "reduce_scatter": (lambda: axis.sum_scatter(whole, **name).wait(), (n - 1) / n),
        "all_to_all": (lambda: axis.exchange(whole, counts, counts, **name).wait(), (n - 1) / n),
        "shift": (lambda: axis.shift(whole, len(whole), **name).wait(), 1.0),
    }


def _batch_seconds(
    axis: Axis, device: torch.device, call: Callable[[], object], batch: int
) -> float:
    """Of one call, on average over `batch` of them that start on all ranks together."""

    def calls() -> None:
        for _ in range(batch):
            call()

    barrier(axis.group)
    return timed(calls, device) / batch


def outliers(values: Sequence[Sequence[float]], tolerance: float) -> list[int]:
    """The members whose median is below that of all by more than `tolerance` and by more than
    the values of one member usually spread.

    values: the repeated measurements of each member.
    """
    medians = [statistics.median(own) for own in values]
    middle = statistics.median(medians)
    spread = statistics.median(max(own) - min(own) for own in values)
    least = middle - max(tolerance * middle, spread)
    return [member for member, own in enumerate(medians) if own < least]
