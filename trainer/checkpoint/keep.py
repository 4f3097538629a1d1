"""Which checkpoints stay when a newer one has been published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Figures = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The `newest` ones (all, if not positive), those at multiples of `every` steps (none at 0),
    and the `best` ones by a figure of an evaluation at their very step.

    metric: its name, as in metrics.jsonl; highest: whether the larger one is better.
    """

    newest: int = 0
    every: int = 0
    best: int = 0
    metric: str = "eval_loss"
    highest: bool = False

    def surplus(self, figures: Mapping[int, Figures]) -> set[int]:
        """Of these steps, with the figures of their evaluations, those no rule keeps."""
        if self.newest <= 0:
            return set()
        steps = sorted(figures)
        kept = set(steps[-self.newest :])
        if self.every > 0:
            kept |= {step for step in steps if step % self.every == 0}
        sign = -1 if self.highest else 1
        values = {step: own.get(self.metric) for step, own in figures.items()}
        scored = [(sign * x, -s) for s, x in values.items() if x is not None and math.isfinite(x)]
        kept |= {-step for _, step in sorted(scored)[: self.best]}  # of equals the newer one
        return set(steps) - kept
