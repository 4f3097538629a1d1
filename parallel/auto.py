"""parallel=auto: the scheme of each operation from its shape, the ranks and the tokens.

Heads first inside a node, as far as they divide: all ranks then do equal work under any mask, and
nothing is merged or computed twice. Across nodes a ring where a hop hides behind its block, else a
gather; latents alone are gathered, being small. Recurrences pass states, whose size no length
changes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from parallel.context import AttentionScheme, RecurrenceScheme
from parallel.cost import (
    Bytes,
    Outer,
    latent_usp_bytes,
    links,
    softmax_usp_bytes,
    state_heads_bytes,
    states_bytes,
)
from parallel.shapes import LatentShape, RecurrenceShape, Shape, SoftmaxShape

# Of a device and its link to another node: 500 TFLOP/s and 50 GB/s, an H100 with 400 Gbit/s.
FLOPS_PER_BYTE = 10_000

Attention = Sequence[SoftmaxShape | LatentShape]  # of layers that share a scheme


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
    """Values for the section `parallel`, and why, in a line for each operation of the model."""

    ulysses: int
    softmax: AttentionScheme
    latent: AttentionScheme
    recurrence: RecurrenceScheme
    outer: Outer
    reasons: Mapping[str, str]


def decide(shapes: Collection[Shape], setting: Setting) -> Decision:
    """Equal arguments give equal decisions, on every rank."""
    ordered = sorted(shapes, key=repr)
    softmax = [s for s in ordered if isinstance(s, SoftmaxShape)]
    latent = [s for s in ordered if isinstance(s, LatentShape)]
    recurrence = [s for s in ordered if isinstance(s, RecurrenceShape)]
    ulysses = setting.ulysses or _neighbours(softmax, latent, setting)
    degree = _degree(softmax, ulysses, setting)
    hidden = _hidden_from(softmax, setting)
    outer: Outer = "ring" if softmax and setting.tokens * degree >= hidden else "gather"
    softmax_scheme = _scheme(degree, outer, setting)
    latent_scheme = _scheme(_degree(latent, ulysses, setting), "gather", setting)
    reasons = {}
    if softmax:
        hops = f"hops hide behind blocks of {hidden:,} tokens or more"
        costs = _costs(softmax, ulysses, outer, setting)
        why = f"{_shared(softmax)}; {hops}"
        reasons["softmax"] = _reason(softmax_scheme, why, costs)
    if latent:
        costs = _costs(latent, ulysses, outer, setting)
        most = min((shape.expanded - 1) // shape.width for shape in latent)
        why = f"{_shared(latent)} among {most} ranks, beyond which whole latents outweigh keys"
        reasons["latent"] = _reason(latent_scheme, why, costs)
    if recurrence:
        costs = _recurrence_costs(recurrence, setting)
        reasons["recurrence"] = _reason("state_passing", "the same at any length", costs)
    return Decision(
        ulysses=ulysses,
        softmax=softmax_scheme,
        latent=latent_scheme,
        recurrence="state_passing",
        outer=outer,
        reasons=reasons,
    )


def _neighbours(softmax: Attention, latent: Attention, setting: Setting) -> int:
    """The Ulysses degree. Operations whose heads all ranks can share need no second level, so the
    others decide."""
    groups = [(group, _most(group, setting)) for group in (softmax, latent)]
    two_level = [shape for group, most in groups if 1 < most < setting.ranks for shape in group]
    return _most(two_level, setting) if two_level else max(most for _, most in groups)


def _most(shapes: Attention, setting: Setting) -> int:
    """The most ranks of one node that take heads of all these; 1 without shapes."""
    shared = gcd(setting.ranks, setting.node)
    degrees = (d for d in range(1, shared + 1) if shared % d == 0 and shapes)
    return max((d for d in degrees if _even(shapes, d) and _cheap(shapes, d)), default=1)


def _even(shapes: Attention, degree: int) -> bool:
    """Whether heads divide: the same work for each rank, no key head on two."""
    return not any(_heads(shape) % degree for shape in shapes)


def _cheap(shapes: Attention, degree: int) -> bool:
    """Whether latents gathered whole are fewer values than a share of the keys and values."""
    latent = (shape for shape in shapes if isinstance(shape, LatentShape))
    return degree == 1 or all(degree * shape.width < shape.expanded for shape in latent)


def _heads(shape: SoftmaxShape | LatentShape) -> int:
    return shape.kv_heads if isinstance(shape, SoftmaxShape) else shape.heads


def _degree(shapes: Attention, ulysses: int, setting: Setting) -> int:
    """How many ranks share the heads of these."""
    if setting.ulysses is not None:
        return ulysses if _even(shapes, ulysses) else 1
    if _most(shapes, setting) == setting.ranks:
        return setting.ranks
    return ulysses if _even(shapes, ulysses) and _cheap(shapes, ulysses) else 1


def _scheme(degree: int, alone: Outer, setting: Setting) -> AttentionScheme:
    if degree == 1:
        return alone
    return "ulysses" if degree == setting.ranks else "usp"


def _hidden_from(shapes: Sequence[SoftmaxShape], setting: Setting) -> int:
    """Tokens from which on a hop of a ring takes no longer than its block under zigzag: n^2 heads
    (dim + v_dim) FLOPs against n kv_heads (dim + v_dim) values."""
    per_head = max(
        (shape.width / (shape.heads * (shape.dim + shape.v_dim)) for shape in shapes), default=0.0
    )
    return round(per_head * setting.size * FLOPS_PER_BYTE)


def _shared(shapes: Attention) -> str:
    counts = sorted({_heads(shape) for shape in shapes})
    kind = "key heads" if isinstance(shapes[0], SoftmaxShape) else "heads"
    return f"{', '.join(map(str, counts))} {kind} to share"


def _costs(shapes: Attention, ulysses: int, outer: Outer, setting: Setting) -> dict[str, Bytes]:
    """Of each scheme that divides the heads evenly, a layer of each shape."""
    schemes: dict[str, tuple[int, Outer]] = {
        "ring": (1, "ring"),
        "gather": (1, "gather"),
        f"usp of {ulysses}": (ulysses, outer),
        "ulysses": (setting.ranks, outer),
    }
    if ulysses in (1, setting.ranks):
        del schemes[f"usp of {ulysses}"]
    return {
        name: sum((_bytes(s, across, degree, setting) for s in shapes), Bytes())
        for name, (degree, across) in schemes.items()
        if _even(shapes, degree)
    }


def _bytes(shape: SoftmaxShape | LatentShape, outer: Outer, degree: int, setting: Setting) -> Bytes:
    """Ring, gather and ulysses are the two-level scheme with one rank on one of the levels."""
    numbers = {
        "tokens": setting.tokens,
        "ranks": setting.ranks,
        "ulysses": degree,
        "size": setting.size,
    }
    if isinstance(shape, SoftmaxShape):
        return softmax_usp_bytes(shape, outer, **numbers)
    return latent_usp_bytes(shape, outer, **numbers)


def _recurrence_costs(shapes: Sequence[RecurrenceShape], setting: Setting) -> dict[str, Bytes]:
    ranks, tokens, size = setting.ranks, setting.tokens, setting.size
    summaries = links(ranks, scan=ranks > setting.scan_ranks)
    costs = {"state_passing": [states_bytes(shape, summaries, size=size) for shape in shapes]}
    if not any(shape.heads % ranks for shape in shapes):
        costs["ulysses"] = [
            state_heads_bytes(shape, tokens=tokens, ranks=ranks, size=size) for shape in shapes
        ]
    return {name: sum(found, Bytes()) for name, found in costs.items()}


def _reason(scheme: str, why: str, costs: Mapping[str, Bytes]) -> str:
    received = ", ".join(f"{name} {cost.total / 2**20:,.2f}" for name, cost in costs.items())
    return (
        f"{scheme}: {why}; MiB to a rank, forward and backward of a layer, for one document "
        f"over all ranks: {received}"
    )
