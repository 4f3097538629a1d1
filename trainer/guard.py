"""Tells the steps that are not to be taken: a loss or gradients that are not finite, a loss that
leaps; and what becomes of them.

Every rank sees the same loss and gradient norm, and judges alike.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Action = Literal["stop", "skip", "rollback"]


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss that lies more than `deviations` standard deviations above the mean of the last
    `window` ones; None: no loss is one. Nothing is judged before there are so many.
    """

    deviations: float | None = None
    window: int = 128
    action: Action = "skip"

    def __post_init__(self) -> None:
        if self.deviations is not None and self.deviations <= 0:
            raise ValueError(f"deviations is {self.deviations}; allowed: above 0, or null")
        if self.window < 2:
            raise ValueError(f"window is {self.window}; allowed: 2 or more")


class Fault(NamedTuple):
    """Of a step that is not to be taken."""

    reason: str
    action: Action


@dataclass(kw_only=True)
class Guard:
    """nonfinite: the action for what is not finite. A rollback goes to a checkpoint at least
    `rollback_steps` behind. The run stops at the skip after `max_skips` in a row, and at the
    rollback after `max_rollbacks` in all.
    """

    nonfinite: Action = "stop"
    spike: Spike = field(default_factory=Spike)
    rollback_steps: int = 100
    max_skips: int = 10
    max_rollbacks: int = 3
    rollbacks: int = 0
    _skips: int = field(default=0, init=False)
    _losses: list[float] = field(default_factory=list, init=False)

    def judge(self, loss: float, norm: float) -> Fault | None:
        """None for a step to be taken, whose loss then counts for what comes."""
        fault = self._fault(loss, norm)
        if fault is None:
            self._skips = 0
            self._losses = [*self._losses, loss][-self.spike.window :]
        elif fault.action == "skip":
            self._skips += 1
            if self._skips > self.max_skips:
                fault = Fault(f"{fault.reason}, after {self.max_skips} skipped steps", "stop")
        elif fault.action == "rollback" and self.rollbacks >= self.max_rollbacks:
            fault = Fault(f"{fault.reason}, after {self.rollbacks} rollbacks", "stop")
        return fault

    def state(self) -> dict[str, Any]:
        """JSON; the same on every rank."""
        return {"losses": self._losses, "skips": self._skips, "rollbacks": self.rollbacks}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses, self._skips = list(state["losses"]), state["skips"]
        self.rollbacks = state["rollbacks"]

    def _fault(self, loss: float, norm: float) -> Fault | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Fault(f"loss {loss}, grad_norm {norm}", self.nonfinite)
        if self.spike.deviations is None or len(self._losses) < self.spike.window:
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        if loss <= mean + self.spike.deviations * deviation:
            return None
        known = f"{mean:.4f} +- {deviation:.4f}"
        return Fault(f"loss {loss} after {known} in {self.spike.window} steps", self.spike.action)
