"""Every mixer of conf/mixer under every scheme: outputs and all gradients are those of one rank."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.mixer import Mixer
from models.sequence import SequenceOp
from parallel.collectives import Axis
from parallel.context import apply_context_parallel, build_schemes
from parallel.cost import planned, planned_links, softmax_bytes, states_bytes
from parallel.shapes import RecurrenceShape, SoftmaxShape
from tests.models.build import MIXERS, compose, make_mixer
from tests.parallel.layouts import Row, cases, local, rank_info, whole
from tests.parallel.ranks import on_ranks
from tests.parallel.routed_schemes import CHUNK
from tests.parallel.routed_schemes import cases as chunked_cases
from tests.parallel.routed_schemes import planned as planned_layout
from tests.parallel.test_softmax_schemes import two_axes

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in MIXERS),
    ("gqa", {"window": 5}),
    ("gdn", {"num_key_heads": 2}),
    ("mamba2", {"num_kv_heads": 2, "num_groups": 4}),
    ("nats_l", {"router_grad": "counterfactual"}),
    ("nats_l", {"latent_rank": 6}),
]
SMALL = {"num_heads": 4, "head_dim": 8, "state_dim": 8, "chunk": CHUNK}  # where a mixer has these
SCHEMES = (  # softmax and latent, recurrence
    ("ring", "state_passing"),
    ("gather", "ulysses"),
    ("ulysses", "state_passing"),
    ("usp", "ulysses"),
)
Schemes = dict[type[SequenceOp], Callable[[SequenceOp], SequenceOp]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_mixer_equals_one_rank(ranks):
    on_ranks(ranks, check_mixers)


def check_mixers(axis: Axis) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    every = list(schemes(axis))
    sections = compose([])["mixer"]
    for i, (name, chosen) in enumerate(CASES):
        options = {key: x for key, x in SMALL.items() if key in sections[name]} | chosen
        layouts = cases if make_mixer(name, **options).token_multiple == 1 else chunked_cases
        for j, (case, peers) in enumerate(layouts(axis.ranks)):
            if (i + j) % len(every):
                continue  # the next mixers have that one
            scheme = (i + j // len(every)) % len(every)
            found = error(name, options, every[scheme], peers, axis)
            assert found < 1e-10, (name, options, case, SCHEMES[scheme], found)


def schemes(axis: Axis) -> Iterator[Schemes]:
    ulysses, ring = two_axes(axis, 2 if axis.ranks == 4 else axis.ranks)
    axes = {"context": axis, "ulysses": ulysses, "ring": ring}
    for attention, recurrence in SCHEMES:
        names: dict[str, Any] = {"softmax": attention, "latent": attention}
        names |= {"recurrence": recurrence, "scan_ranks": 3, "outer": "ring"}
        yield build_schemes(**axes, **names)


def error(
    name: str, options: dict[str, Any], chosen: Schemes, peers: tuple[Row, ...], axis: Axis
) -> float:
    """Largest difference of output and gradients on this rank, relative to the largest entry."""
    everything, info = whole(peers), rank_info(peers, axis.rank)
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, 1, everything.shape[1], 24, generator=generator).double()
    single, shared = make_mixer(name, **options), make_mixer(name, **options)
    holder = nn.ModuleDict({"mixer": shared})
    apply_context_parallel(holder, chosen)
    expected = results(single, x.requires_grad_(), weight, everything)
    got = results(shared, local(x, info), local(weight, info), info)
    pairs = [(got[i], expected[i][:, info.index[0]], expected[i]) for i in range(2)]
    for mine, theirs in zip(got[2:], expected[2:], strict=True):
        dist.all_reduce(mine)
        pairs.append((mine, theirs, theirs))
    return max(((a - b).abs().amax() / c.abs().amax().clamp(min=1e-6)).item() for a, b, c in pairs)


def results(mixer: Mixer, x: Tensor, weight: Tensor, info: Any) -> list[Tensor]:
    """Output, and the gradients of the input and of every parameter."""
    output = mixer(x, info)
    return [output, *torch.autograd.grad((output * weight).sum(), [x, *mixer.parameters()])]


def test_a_routed_mixer_sends_kept_chunks_and_states():
    on_ranks(4, check_routed_bytes)


def check_routed_bytes(axis: Axis) -> None:
    """Half of the chunks are kept: within 5% half of what a gather of all keys, or of all latents,
    receives."""
    keys = SoftmaxShape(heads=4, kv_heads=4, dim=4, v_dim=8)
    latents = SoftmaxShape(heads=4, kv_heads=2, dim=24, v_dim=24, shared=True)
    for rank, shape in ((None, keys), (24, latents)):
        check_share(axis, shape, latent_rank=rank)


def check_share(axis: Axis, shape: SoftmaxShape, **keywords: Any) -> None:
    peers = planned_layout([61, 200, 7], axis.ranks, "balanced")
    options = SMALL | {"num_heads": 2, "router": "strided", "static_share": 0.5} | keywords
    del options["state_dim"]
    holder = nn.ModuleDict({"mixer": make_mixer("nats_l", **options)})
    axes = {"context": axis, "ulysses": axis, "ring": axis}
    names: dict[str, Any] = {"softmax": "gather", "latent": "gather", "outer": "gather"}
    names |= {"recurrence": "state_passing", "scan_ranks": 32}
    apply_context_parallel(holder, build_schemes(**axes, **names))
    info = rank_info(peers, axis.rank)
    x = torch.randn(*info.shape, 24, dtype=torch.float64, requires_grad=True)
    holder["mixer"](x, info).sum().backward()
    received: Counter[str] = Counter()
    for (_, op, _), count in axis.traffic.take().items():
        received[op] += count

    states = RecurrenceShape(heads=2, key_dim=8, value_dim=16, decays=1, transition=64)
    expected = states_bytes(states, planned_links(peers, axis.rank), size=8)
    assert received["recurrence"] == expected.total
    dense = softmax_bytes(shape, planned("gather", peers, axis.rank), size=8).total
    both = torch.tensor([received["routed"], dense], dtype=torch.float64)
    dist.all_reduce(both)
    routed, of_all = both.tolist()
    assert routed == pytest.approx(of_all / 2, rel=0.05)
