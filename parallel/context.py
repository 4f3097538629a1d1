"""Context parallelism of a whole model: every operation across tokens gets its scheme."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from torch import nn

from models.ops.routed import RoutedAttention
from models.sequence import (
    CausalConv,
    LatentAttention,
    LinearRecurrence,
    SequenceOp,
    SoftmaxAttention,
)
from parallel.collectives import Axis
from parallel.gather import GatherAttention
from parallel.halo import HaloExchange
from parallel.latent import LatentGather, LatentRing, LatentUlysses
from parallel.ring import RingAttention
from parallel.routed import RoutedGather, RoutedRing, RoutedUlysses
from parallel.state_passing import StatePassing, UlyssesRecurrence
from parallel.ulysses import UlyssesAttention

Scheme = Callable[..., SequenceOp]
AttentionScheme = Literal["ring", "gather", "ulysses", "usp"]
RecurrenceScheme = Literal["state_passing", "ulysses"]

_SOFTMAX: dict[str, Scheme] = {
    "ring": RingAttention,
    "gather": GatherAttention,
    "ulysses": UlyssesAttention,
}
_ROUTED: dict[str, Scheme] = {
    "ring": RoutedRing,
    "gather": RoutedGather,
    "ulysses": RoutedUlysses,
}
_LATENT: dict[str, Scheme] = {
    "ring": LatentRing,
    "gather": LatentGather,
    "ulysses": LatentUlysses,
}

HeadsFirst = UlyssesAttention | RoutedUlysses | LatentUlysses | UlyssesRecurrence
_HEADS_FIRST: dict[type[SequenceOp], type[HeadsFirst]] = {
    SoftmaxAttention: UlyssesAttention,
    RoutedAttention: RoutedUlysses,
    LatentAttention: LatentUlysses,
    LinearRecurrence: UlyssesRecurrence,
}


def apply_context_parallel(
    model: nn.Module, schemes: Mapping[type[SequenceOp], Callable[[SequenceOp], SequenceOp]]
) -> None:
    """Replaces every `SequenceOp` in place by its contract's scheme around it.

    An operation inside another is the business of the outer one. Names of parameters and keys of
    the state stay as they were. Raises ValueError naming an operation that has no scheme.
    """
    replaced: list[str] = []
    for path, op in list(model.named_modules()):
        if not isinstance(op, SequenceOp) or any(path.startswith(f"{p}.") for p in replaced):
            continue
        scheme = next((s for contract, s in schemes.items() if isinstance(op, contract)), None)
        if scheme is None:
            allowed = ", ".join(contract.__name__ for contract in schemes) or "none"
            raise ValueError(
                f"{path} is a {type(op).__name__}, which has no context-parallel scheme; "
                f"there is one for each {allowed}"
            )
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, scheme(op))
        replaced.append(path)


def build_schemes(
    *,
    context: Axis,
    ulysses: Axis,
    ring: Axis,
    softmax: AttentionScheme,
    latent: AttentionScheme,
    recurrence: RecurrenceScheme,
    scan_ranks: int,
    outer: Literal["ring", "gather"],
) -> dict[type[SequenceOp], Callable[[SequenceOp], SequenceOp]]:
    """The scheme of each contract, by name; routed attention has that of softmax.

    usp is ulysses over the `ulysses` axis around `outer` over the `ring` axis; all others use the
    whole context axis. Above scan_ranks ranks, states are passed by a scan in log2(ranks) rounds.
    """
    passing = partial(StatePassing, axis=context, scan_ranks=scan_ranks)
    heads = partial(UlyssesRecurrence, axis=context)

    def attention(table: Mapping[str, Scheme], name: str) -> Callable[[SequenceOp], SequenceOp]:
        if name != "usp":
            return partial(table[name], axis=context)

        def both(op: SequenceOp) -> SequenceOp:
            inner = table[outer](op, axis=ring) if ring.ranks > 1 else op
            return table["ulysses"](inner, axis=ulysses) if ulysses.ranks > 1 else inner

        return both

    return {
        SoftmaxAttention: attention(_SOFTMAX, softmax),
        RoutedAttention: attention(_ROUTED, softmax),
        LatentAttention: attention(_LATENT, latent),
        LinearRecurrence: passing if recurrence == "state_passing" else heads,
        CausalConv: partial(HaloExchange, axis=context),
    }


def heads_needed(module: nn.Module) -> dict[type[SequenceOp], int]:
    """The most ranks over which a scheme inside `module` divides heads, for each contract of which
    one does."""
    needed = {}
    for contract, scheme in _HEADS_FIRST.items():
        ranks = [m.axis.ranks for m in module.modules() if isinstance(m, scheme)]
        if ranks:
            needed[contract] = max(ranks)
    return needed
