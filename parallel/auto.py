"""parallel=auto: the scheme of each operation from its shape, the ranks and the tokens.

Heads first inside a node, as far as they divide: all ranks then do equal work under any mask, and
nothing is merged or computed twice. Across nodes a ring where a hop hides behind its block, else a
gather; latents alone are gathered, being small. Recurrences pass states, whose size no length
changes.
"""

from collections.abc import Collection
from dataclasses import dataclass

from parallel.context import AttentionScheme, RecurrenceScheme
from parallel.cost import (
    Outer,
)
from parallel.shapes import LatentShape, RecurrenceShape, Shape, SoftmaxShape

AttentionShape = SoftmaxShape | LatentShape

# Of a device and its link to another node: 500 TFLOP/s and 50 GB/s, an H100 with 400 Gbit/s.
FLOPS_PER_BYTE = 10_000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a decision rests on beside the shapes."""

    ranks: int  # that share a sequence
    node: int  # ranks of the run on one node, neighbours
    tokens: int  # of one rank
    size: int  # bytes of an activation
    scan_ranks: int = 32
    ulysses: int | None = None  # a degree that is not to be chosen


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Values for the section `parallel`, and a line per operation that says why."""

    ulysses: int
    softmax: AttentionScheme
    latent: AttentionScheme
    recurrence: RecurrenceScheme
    outer: Outer
    reasons: tuple[str, ...]


def decide(shapes: Collection[Shape], setting: Setting) -> Decision:
    """Equal arguments give equal decisions, on every rank."""
    ordered = sorted(shapes, key=repr)
    softmax = [s for s in ordered if isinstance(s, SoftmaxShape)]
    latent = [s for s in ordered if isinstance(s, LatentShape)]
    recurrent = [s for s in ordered if isinstance(s, RecurrenceShape)]
    ulysses = setting.ulysses or _ulysses([softmax, latent], setting)
    degree = _degree(softmax, ulysses, setting)
    hidden = setting.tokens * degree >= _hiding_tokens(softmax, setting)
    outer: Outer = "ring" if softmax and hidden else "gather"
    softmax_scheme = _scheme(degree, outer, setting)
    latent_scheme = _scheme(_degree(latent, ulysses, setting), "gather", setting)
    lines = [
        _line(
            "softmax",
            softmax_scheme,
            _softmax_why(softmax, degree, outer, setting),
        )
    ]
