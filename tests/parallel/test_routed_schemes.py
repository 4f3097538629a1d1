"""Routed attention over several ranks against one rank: results, gradients, bytes, refusals."""

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from models.ops.routed import ABSENT, RoutedAttention, RoutedKeys
from models.ops.routed_softmax import DenseRoutedAttention, TiledRoutedAttention
from models.sequence import Fragment, Peers, SequenceInfo
from parallel import cost
from parallel.collectives import Axis, Traffic
from parallel.parcels import Choice, Parcels, needed
from parallel.routed import RoutedGather, RoutedRing, RoutedUlysses
from parallel.shapes import SoftmaxShape
from tests.parallel.layouts import Row, local, rank_info, whole
from tests.parallel.ranks import on_ranks
from tests.parallel.routed_schemes import (
    CHUNK,
    DIM,
    HEADS,
    SCHEMES,
    V_DIM,
    attend,
    cases,
    error,
    inputs,
    left_out,
    planned,
)
from tests.parallel.test_softmax_messages import readers
from tests.parallel.test_softmax_schemes import two_axes


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_schemes_equal_one_rank(ranks):
    on_ranks(ranks, check_schemes)


def check_schemes(axis: Axis) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for i, (case, peers) in enumerate(cases(axis.ranks)):
        if left_out(i, axis.ranks):
            continue
        heads, own = HEADS[i % len(HEADS)], not case.endswith("one")
        for name, build in SCHEMES.items():
            keywords = {"own": own, "counterfactual": i % 2 == 1, "shared": (i + i // 4) % 3 == 0}
            found = error(build, peers, heads, axis, **keywords)
            assert found < 1e-10, (case, heads, name, found)


def test_two_levels_equal_one_rank():
    on_ranks(4, check_two_levels)


def check_two_levels(axis: Axis) -> None:
    ulysses, ring = two_axes(axis, 2)
    for i, (case, peers) in enumerate(cases(4)):
        if left_out(i, 3):
            continue
        inner = list(SCHEMES)[i % 2]

        def build(op, _, inner=inner):
            return RoutedUlysses(SCHEMES[inner](op, ring), axis=ulysses)

        found = error(build, peers, HEADS[i % 3], axis, counterfactual=i % 4 > 1)
        assert found < 1e-10, (case, inner, found)


def test_a_single_rank_needs_no_scheme():
    alone = Axis(group=None, rank=0, ranks=1, traffic=Traffic())  # type: ignore[arg-type]
    for case, peers in cases(1):
        for build in SCHEMES.values():
            assert error(build, peers, (4, 2), alone) < 1e-10, case


def test_mutations_are_noticed():
    on_ranks(3, check_mutations)


def check_mutations(axis: Axis) -> None:
    peers = planned([30, 5], 3, "zigzag")
    for scheme in ("ring", "gather"):
        for name, mutation in mutations(axis):
            with mutation:
                found = error(SCHEMES[scheme], peers, (4, 2), axis, counterfactual=True)
            found = torch.tensor(found)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            assert found > 1e-4, (scheme, name)
        assert error(SCHEMES[scheme], peers, (4, 2), axis, counterfactual=True) < 1e-10


def mutations(axis: Axis) -> list[tuple[str, AbstractContextManager]]:
    def dropped(self, *args, original=Choice.parcels):
        parcels = original(self, *args)
        if axis.rank != 1:
            return parcels
        return replace(parcels, index=torch.full_like(parcels.index, ABSENT))

    def swapped(self, *grads, original=Parcels.give_back):
        return original(self, *grads[1::-1], *grads[2:])  # dv where dk should be

    def no_gates(self, *grads, original=Parcels.give_back):
        return original(self, *grads[:-1], torch.zeros_like(grads[-1]))

    def nothing(*args):
        pass

    def kept_again(self, original=Choice.others):
        original(self)
        return self

    return [
        ("dropped parcel", patch.object(Choice, "parcels", dropped)),
        ("swapped dK and dV", patch.object(Parcels, "give_back", swapped)),
        ("lost gradients", patch.object(Parcels, "add_returned", nothing)),
        ("lost gradients of gates", patch.object(Parcels, "give_back", no_gates)),
        ("counterfactual of kept chunks", patch.object(Choice, "others", kept_again)),
    ]


def test_bytes_follow_the_kept_share():
    on_ranks(4, check_bytes)


def check_bytes(axis: Axis) -> None:
    for counterfactual in (False, True):
        op = TiledRoutedAttention(chunk=CHUNK, counterfactual=counterfactual)
        for case, peers in cases(axis.ranks):
            if case in ("zigzag edges", "contiguous three ranks", "dealt one"):
                for scheme, shared in product(("ring", "gather"), (False, True)):
                    got = traffic(SCHEMES[scheme](op, axis), axis, peers, shared=shared)
                    width = DIM if shared else DIM + V_DIM
                    expected = predicted(peers, axis.rank, counterfactual, width)
                    assert got == expected, (case, scheme, shared)
    check_share(axis)
    peers = planned([8] * axis.ranks, axis.ranks, "balanced")
    for build in SCHEMES.values():
        assert not traffic(build(op, axis), axis, peers)  # no document is cut


HALF = (8, 4)  # heads, of keys at every other chunk


def traffic(op, axis: Axis, peers: tuple[Row, ...], *, shared: bool = False) -> Counter[str]:
    """Of bf16, by direction."""
    info = rank_info(peers, axis.rank)
    attend(op, [local(x, info) for x in half_kept(peers)], info, shared=shared)
    found: Counter[str] = Counter()
    for (_, served, direction), received in axis.traffic.take().items():
        assert served == "routed"
        found[direction] += received
    return found


def half_kept(peers: tuple[Row, ...]) -> list[torch.Tensor]:
    """Every head keeps every other chunk of a document, from its first or its second on."""
    q, k, v, _, weight = inputs(peers, HALF, torch.bfloat16)
    number = whole(peers).positions // CHUNK
    keep = (number.unsqueeze(-1) + torch.arange(HALF[1])) % 2
    return [q, k, v, keep.double().requires_grad_(), weight]


def predicted(peers: tuple[Row, ...], rank: int, counterfactual: bool, width: int) -> Counter[str]:
    """From the tokens that some rank reads and the heads that keep them, one by one; width: of a
    token and head."""
    keep = half_kept(peers)[3][0].detach()
    read, again, returned = Counter(), 0.0, 0.0
    for (owner, index), ranks in readers(peers, True).items():
        kept = float(keep[index].sum())
        if rank in ranks:
            read["masks"] += HALF[1] / CHUNK
            read["kept"] += 2 * width * kept
            again += 2 * width * (HALF[1] if counterfactual else kept)
        if owner == rank:
            gates = HALF[1] if counterfactual else kept
            returned += len(ranks) * 4 * (width * kept + gates / CHUNK)
    total = {"forward": read["masks"] + read["kept"], "backward": again + returned}
    return Counter({way: round(found) for way, found in total.items() if found})


def check_share(axis: Axis) -> None:
    """Half of what gather would move of all keys and values, within 5%."""
    peers = planned([61, 200, 7], axis.ranks, "balanced")
    op = RoutedGather(TiledRoutedAttention(chunk=CHUNK), axis=axis)
    shape = SoftmaxShape(heads=HALF[0], kv_heads=HALF[1], dim=DIM, v_dim=V_DIM)
    dense = cost.softmax_bytes(shape, cost.planned("gather", peers, axis.rank), size=2)
    both = torch.tensor([traffic(op, axis, peers).total(), dense.total], dtype=torch.float64)
    dist.all_reduce(both)
    got, of_all = both.tolist()
    assert got == pytest.approx(of_all / 2, rel=0.05)


def test_pairs_of_chunks_are_those_of_one_rank():
    on_ranks(3, check_pairs)


def check_pairs(axis: Axis) -> None:
    """Each is counted on one rank, in the backward pass."""
    for strategy in ("zigzag", "balanced"):
        peers = planned([30, 9, 3, 14], 3, strategy)
        info, single = rank_info(peers, axis.rank), TiledRoutedAttention(chunk=CHUNK)
        attend(single, inputs(peers, (6, 3)), whole(peers))
        for name, build in SCHEMES.items():
            scheme = build(TiledRoutedAttention(chunk=CHUNK), axis)
            own = [local(x, info) for x in inputs(peers, (6, 3))]
            scheme(*own[:4], info)
            attend(scheme, own, info)
            ops = [op for op in scheme.modules() if isinstance(op, RoutedAttention)]
            pairs = torch.tensor(sum(op.pairs for op in ops))
            dist.all_reduce(pairs)
            assert pairs == single.pairs > 0, name


def test_messages_overlap_blocks():
    on_ranks(3, check_overlap)


def check_overlap(axis: Axis) -> None:
    """The parcels of a round are posted before those of the round before are computed."""
    peers = planned([48], 3, "zigzag")
    found = {}
    for name in ("gather", "ring"):
        op = SCHEMES[name](TiledRoutedAttention(chunk=CHUNK), axis)
        info = rank_info(peers, axis.rank)
        axis.traffic.trace = []
        attend(op, [local(x, info) for x in inputs(peers, (4, 2))], info)
        found[name] = " ".join(event for event, _ in axis.traffic.trace)
        axis.traffic.trace = None
    masks = "post wait"
    assert found["gather"] == f"{masks} post wait post wait post wait"
    assert found["ring"] == (f"{masks} post wait post wait post wait post post wait wait post wait")


def test_bfloat16_is_as_good_as_on_one_rank():
    on_ranks(3, check_bfloat16)


def check_bfloat16(axis: Axis) -> None:
    peers, heads = planned([130, 1, 40], 3, "zigzag"), (6, 3)
    rounded = inputs(peers, heads, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in rounded]
    exact = attend(DenseRoutedAttention(chunk=CHUNK), exact, whole(peers))
    info, tiled = rank_info(peers, axis.rank), TiledRoutedAttention(chunk=CHUNK)
    single = [x[:, info.index[0]] for x in attend(tiled, rounded, whole(peers))]
    for name, build in SCHEMES.items():
        own = [local(x, info) for x in rounded]
        got = attend(build(tiled, axis), own, info)
        for x, y, z in zip(got, single, exact, strict=True):
            z = z[:, info.index[0]]
            assert x.dtype == y.dtype
            # Gradients of gates are never rounded to bf16, only summed in fp32.
            assert (x - z).norm() <= 2 * (y - z).norm() + 1e-6 * z.norm(), name
        wide = [local(x.detach().float().requires_grad_(), info) for x in rounded]
        wide[3] = own[3]
        with torch.autocast("cpu", torch.bfloat16):
            cast = attend(build(tiled, axis), wide, info)
        assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(got, cast, strict=True)), name


def test_chunks_that_another_rank_may_need():
    """Of the document at 3, rank 0 holds chunks 1 and 3 of five, the last of two tokens; its row
    starts with a document of its own."""
    row = SequenceInfo.from_lengths([[3, 18]]).fragments[0]
    short, long = row
    piece = lambda first, stop: replace(  # noqa: E731
        long, index=3 + first, position=first, length=stop - first
    )
    peers = Peers(
        (
            (short, piece(4, 8), piece(12, 16)),
            (piece(0, 4), piece(8, 12)),
            (piece(16, 18),),
        )
    )
    assert needed(peers, 0, 1, CHUNK) == [(1, 7)]
    assert needed(peers, 0, 2, CHUNK) == [(1, 7), (2, 15)]
    assert needed(peers, 1, 0, CHUNK) == [(0, 3), (1, 11)]
    assert needed(peers, 2, 0, CHUNK) == []


@pytest.fixture
def axis() -> Axis:
    """Two ranks that never meet: for what is refused before any message."""
    return Axis(group=None, rank=0, ranks=2, traffic=Traffic())  # type: ignore[arg-type]


def test_bad_input(axis):
    peers = planned([16], 2, "contiguous")
    info = rank_info(peers, 0)
    *tensors, _ = (local(x, info) for x in inputs(peers, (4, 2)))
    past = RoutedKeys((torch.zeros(1),), torch.zeros(1))
    for name, build in SCHEMES.items():
        scheme = build(TiledRoutedAttention(chunk=CHUNK), axis)
        with pytest.raises(ValueError, match="got past chunks; parallel=single takes them"):
            scheme(*tensors, info, past=past)
        with pytest.raises(ValueError, match="0 peers"):
            scheme(*tensors, SequenceInfo.from_lengths([[8]]))
        if name != "ulysses":
            with pytest.raises(ValueError, match="DenseRoutedAttention has no blocks for Routed"):
                build(DenseRoutedAttention(chunk=CHUNK), axis)
    off_the_grid = (Fragment(7, 0),), (Fragment(7, 7, 7),)
    *tensors, _ = (x[:, :7] for x in inputs(peers, (4, 2)))
    scheme = RoutedRing(TiledRoutedAttention(chunk=CHUNK), axis=replace(axis, rank=1))
    with pytest.raises(ValueError, match="position 7 of their document"):
        scheme(*tensors, rank_info(off_the_grid, 1))
