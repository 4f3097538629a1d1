"""Which checkpoints stay when a newer one has been published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The `newest` ones (all, if not positive), those at multiples of `every` steps (none at 0),
    and the `best` ones by the loss of an evaluation at their very step."""

    newest: int = 0
    every: int = 0
    best: int = 0

    def surplus(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of these steps, with their losses where they were evaluated, those no rule keeps."""
        if self.newest <= 0:
            return set()
        steps = sorted(losses)
        kept = set(steps[-self.newest :])
        if self.every > 0:
            kept |= {step for step in steps if step % self.every == 0}
        scored = [(loss, -step) for step, loss in losses.items() if _counts(loss)]
        kept |= {-step for _, step in sorted(scored)[: self.best]}  # of equals the newer one
        return set(steps) - kept


def _counts(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
