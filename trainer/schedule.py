"""Learning-rate schedules: pure functions from the step, counted from 1, to a factor of the rate.

Nothing is remembered between steps, so a resumed run needs no scheduler state. Warm-up and decay
are shares of `total_steps`; behind it the last factor is held.
"""

import math


def wsd(
    step: int, *, total_steps: int, warmup: float = 0.05, decay: float = 0.2, final: float = 0.0
) -> float:
    """Warm up, stay, then fall linearly to `final`: warmup-stable-decay, arXiv 2404.06395."""
    _check(total_steps, warmup=warmup, decay=decay, final=final)
    if warmup + decay > 1:
        raise ValueError(f"warmup + decay is {warmup + decay}; allowed: at most 1")
    # `final` belongs to the step behind the last one, which therefore still learns.
    left = min(max(total_steps + 1 - step, 0) / (total_steps * decay + 1), 1.0)
    return _warm(step, total_steps, warmup) * (final + (1 - final) * left)


def cosine(step: int, *, total_steps: int, warmup: float = 0.05, final: float = 0.1) -> float:
    """Warm up, then half a cosine from 1 to `final`, arXiv 1608.03983."""
    _check(total_steps, warmup=warmup, final=final)
    start = total_steps * warmup
    done = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
    return _warm(step, total_steps, warmup) * (
        final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    )


def constant(step: int, *, total_steps: int, warmup: float = 0.05) -> float:
    """Warm up, then stay."""
    _check(total_steps, warmup=warmup)
    return _warm(step, total_steps, warmup)


def _warm(step: int, total_steps: int, share: float) -> float:
    return min(step / max(total_steps * share, 1), 1.0)


def _check(total_steps: int, **shares: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; allowed: 1 or more")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; allowed: 0 to 1")
