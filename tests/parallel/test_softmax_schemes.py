"""Ring, gather, Ulysses and two-level attention against one rank: results, gradients, refusals."""

from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from models.ops.softmax import AtenSoftmax, EinsumSoftmax, merge_
from models.sequence import SequenceInfo, SoftmaxAttention, Visibility
from parallel.collectives import Axis, Traffic
from parallel.gather import GatherAttention, fetch
from parallel.plans import merge_order
from parallel.ring import stops
from parallel.softmax import Gradients, Merging
from parallel.ulysses import HeadExchange, UlyssesAttention
from tests.parallel.layouts import (
    Row,
    cases,
    contiguous,
    local,
    place,
    rank_info,
    whole,
    zigzag,
)
from tests.parallel.ranks import on_ranks
from tests.parallel.softmax_schemes import HEADS, SCHEMES, V_DIM, attend, errors, inputs


@pytest.fixture
def axis() -> Axis:
    """Two ranks that never meet: for what is refused before any message."""
    return Axis(group=None, rank=0, ranks=2, traffic=Traffic())  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_schemes_equal_one_rank(ranks):
    """Ulysses without replicated heads bitwise."""
    on_ranks(ranks, check_schemes)


def check_schemes(axis: Axis) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for i, (case, peers) in enumerate(cases(axis.ranks)):
        kind, heads = [EinsumSoftmax, AtenSoftmax][i % 2], HEADS[i % len(HEADS)]
        kinds = ((True, None), (False, None), (True, 5))
        in_turn = kinds[i % 3 :][:1]  # every one with each document and layout
        for causal, window in kinds if axis.ranks == 2 else in_turn:
            schemes = [build(kind(causal=causal), axis) for build in SCHEMES.values()]
            found = errors(schemes, peers, heads, axis.rank, causal=causal, window=window)
            by_scheme = dict(zip(SCHEMES, found, strict=True))
            assert max(found) < 1e-10, (case, heads, causal, window, by_scheme)
        if axis.ranks != 3 and case.endswith("edges"):
            check_bitwise(axis, case, peers)


def check_bitwise(axis: Axis, case: str, peers: tuple[Row, ...]) -> None:
    # Head dims of whole cache lines: matrix libraries choose their loops by alignment.
    tensors = inputs(peers, (8, 4), dims=(32, 16), dtype=torch.float32)
    info = rank_info(peers, axis.rank)
    expected = attend(AtenSoftmax(), tensors, whole(peers))
    scheme = UlyssesAttention(AtenSoftmax(), axis=axis)
    got = attend(scheme, [local(x, info) for x in tensors], info)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y[:, info.index[0]]), case


def test_a_single_rank_needs_no_scheme(axis):
    alone = replace(axis, ranks=1)
    for case, peers in cases(1):
        found = errors(
            [build(AtenSoftmax(), alone) for build in SCHEMES.values()], peers, (4, 2), 0
        )
        assert max(found) < 1e-10, case


def two_axes(axis: Axis, ulysses: int) -> tuple[Axis, Axis]:
    """The ulysses axis of neighbouring ranks and the ring axis across them."""
    every = torch.arange(axis.ranks).view(-1, ulysses)
    found = []
    for table in (every, every.T):
        for members in table.tolist():
            group = dist.new_group(members)
            if axis.rank in members:
                at = members.index(axis.rank)
                found.append(replace(axis, group=group, rank=at, ranks=len(members)))
    return found[0], found[1]


def test_two_levels_equal_one_rank():
    on_ranks(4, check_two_levels)


def check_two_levels(axis: Axis) -> None:
    ulysses, ring = two_axes(axis, 2)
    for i, (case, peers) in enumerate(cases(4)):
        options = {"causal": i % 3 > 0, "window": 5 if i % 3 == 1 else None}
        op = AtenSoftmax(causal=options["causal"])
        inner = [SCHEMES[name](op, ring) for name in ("ring", "gather")]
        schemes: list[SoftmaxAttention] = [UlyssesAttention(x, axis=ulysses) for x in inner]
        found = errors(schemes, peers, HEADS[i % len(HEADS)], axis.rank, **options)
        assert max(found) < 1e-10, (case, options, found)


def test_mutations_are_noticed():
    on_ranks(3, check_mutations)


def check_mutations(axis: Axis) -> None:
    peers = place([15, 2], zigzag(3, 6))
    for causal, every in ((True, mutations()), (False, lost_masks())):
        for name, scheme, mutation in every:
            tested = [SCHEMES[scheme](AtenSoftmax(causal=causal), axis)]
            with mutation:
                found = errors(tested, peers, (4, 2), axis.rank, causal=causal)
            error = torch.tensor(found)
            dist.all_reduce(error, dist.ReduceOp.MAX)
            assert error > 1e-3, name
            assert errors(tested, peers, (4, 2), axis.rank, causal=causal)[0] < 1e-10


def lost_masks() -> list[tuple[str, str, AbstractContextManager]]:
    """Places that take attention for causal where it is not."""

    def causal_plan(plan):
        return lambda peers, rank, causal: plan(peers, rank, causal=True)

    def causal_op(method):
        def mutated(self, *args):
            self.op = AtenSoftmax()
            return method(self, *args)

        return mutated

    return [
        ("plan", "ring", patch("parallel.ring.stops", causal_plan(stops))),
        ("plan", "gather", patch("parallel.gather.fetch", causal_plan(fetch))),
        ("hop", "ring", patch.object(Merging, "add", causal_op(Merging.add))),
        ("backward hop", "ring", patch.object(Gradients, "of", causal_op(Gradients.of))),
        ("group", "gather", patch.object(Merging, "add", causal_op(Merging.add))),
        ("backward group", "gather", patch.object(Gradients, "of", causal_op(Gradients.of))),
    ]


def mutations() -> list[tuple[str, str, AbstractContextManager]]:
    def without_last_block(peers, rank, causal):
        *path, last = stops(peers, rank, causal=causal)
        return *path, last._replace(needed=False)

    def swapped(self, k, v, keys, original=Gradients.of):
        return original(self, k, v, keys).roll(V_DIM, -1)  # dv where dk should be

    def twice(output, lse, part, part_lse, original=merge_):
        original(output, lse, part, part_lse)
        original(output, lse, part, part_lse)

    def as_they_came(*group, original=merge_order):
        order = torch.arange(len(original(*group)[0]))
        return order, order

    def one_reader(self, tensors, heads, direction, original=HeadExchange.gather_heads):
        whole = original(self, tensors, heads, direction)
        return tuple(x / (1 + (x.shape[2] < self.heads)) for x in whole)

    def nothing(*args):
        pass

    return [
        ("dropped hop", "ring", patch("parallel.ring.stops", without_last_block)),
        ("swapped dK and dV", "ring", patch.object(Gradients, "of", swapped)),
        ("block counted twice", "ring", patch("parallel.softmax.merge_", twice)),
        ("lost gradients", "ring", patch("parallel.ring.add_", nothing)),
        ("swapped dK and dV", "gather", patch.object(Gradients, "of", swapped)),
        ("block counted twice", "gather", patch("parallel.softmax.merge_", twice)),
        ("lost gradients", "gather", patch("parallel.gather.add_", nothing)),
        ("unsorted", "ulysses", patch("parallel.ulysses.merge_order", as_they_came)),
        ("replicas not summed", "ulysses", patch.object(HeadExchange, "gather_heads", one_reader)),
    ]


def test_bf16_is_as_good_as_on_one_rank():
    on_ranks(3, check_bf16)


def check_bf16(axis: Axis) -> None:
    peers, heads = place([130, 1, 40], zigzag(3, 64)), (6, 2)
    rounded = inputs(peers, heads, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in rounded]
    exact = attend(EinsumSoftmax(), exact, whole(peers))
    info = rank_info(peers, axis.rank)
    single = [x[:, info.index[0]] for x in attend(AtenSoftmax(), rounded, whole(peers))]
    for name, build in SCHEMES.items():
        scheme = build(AtenSoftmax(), axis)
        got = attend(scheme, [local(x, info) for x in rounded], info)
        for x, y, z in zip(got, single, exact, strict=True):
            z = z[:, info.index[0]]
            assert x.dtype == torch.bfloat16
            assert (x - z).norm() <= 2 * (y - z).norm(), name
        wide = [local(x.detach().float().requires_grad_(), info) for x in rounded]
        with torch.autocast("cpu", torch.bfloat16):
            cast = attend(scheme, wide, info)
        assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(got, cast, strict=True)), name


@pytest.mark.parametrize("name", SCHEMES)
def test_refusals(name, axis):
    peers = place([14], contiguous(2, 7))
    info, scheme = rank_info(peers, 0), SCHEMES[name](AtenSoftmax(), axis)
    qkv = [local(x, info) for x in inputs(peers, (4, 2))][:3]
    alone = SequenceInfo.from_lengths([[7]])
    with pytest.raises(ValueError, match="key_info"):
        scheme(*qkv, info, key_info=alone)
    with pytest.raises(ValueError, match="takes no visibility"):
        scheme(*qkv, info, visibility=Visibility(info.index, info.index, info.valid))
    with pytest.raises(ValueError, match="0 peers"):
        scheme(*qkv, alone)
    three = place([21], contiguous(3, 7))
    with pytest.raises(ValueError, match=r"of 2 got the row of rank 0 of 3|must divide the 3"):
        scheme(*qkv, rank_info(three, 0))


def test_ulysses_refuses_what_it_cannot_share(axis):
    ulysses = UlyssesAttention(AtenSoftmax(), axis=axis)
    peers = place([14], contiguous(2, 7))
    one_head = [local(x, rank_info(peers, 0)) for x in inputs(peers, (1, 1))][:3]
    with pytest.raises(ValueError, match="ulysses is 2 with 1 heads"):
        ulysses(*one_head, rank_info(peers, 0))
    four = place([28], contiguous(4, 7))
    with pytest.raises(ValueError, match="must be a SoftmaxScheme"):
        ulysses(
            *(local(x, rank_info(four, 0)) for x in inputs(four, (4, 2))[:3]), rank_info(four, 0)
        )


def test_gather_refuses_no_groups(axis):
    with pytest.raises(ValueError, match="head_groups is 0"):
        GatherAttention(AtenSoftmax(), axis=axis, head_groups=0)
