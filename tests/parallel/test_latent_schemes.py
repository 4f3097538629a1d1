"""Latent schemes on several ranks: results are those of one rank, and bytes are as predicted."""

import weakref
from collections import Counter
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.latent
from models.ops.latent import MaterialisedLatent
from models.ops.softmax import AtenSoftmax, EinsumSoftmax
from models.precision import widen
from models.sequence import SequenceInfo
from parallel.collectives import Axis, Traffic
from parallel.latent import LatentGather, LatentRing, LatentScheme, LatentUlysses
from parallel.ring import RingAttention
from tests.helpers import assert_equal, random_tensors
from tests.parallel.layouts import Row, cases, contiguous, place, rank_info, whole, zigzag
from tests.parallel.ranks import on_ranks

HEADS, NOPE, ROPE, V_DIM, RANK = 5, 5, 2, 4, 6
WIDTH = RANK + ROPE  # values per token that travel
SEQ = 12  # tokens per rank, where a check makes its own layout
MATERIALISED = MaterialisedLatent(EinsumSoftmax()), MaterialisedLatent(AtenSoftmax())
FULL = tuple(MaterialisedLatent(kind(causal=False)) for kind in (EinsumSoftmax, AtenSoftmax))


def two_axes(axis: Axis, ulysses: int) -> tuple[Axis, Axis]:
    """(ulysses, ring) axes of context ranks ring_rank * ulysses + ulysses_rank."""
    rings = axis.ranks // ulysses
    near = [[r * ulysses + u for u in range(ulysses)] for r in range(rings)]
    far = [[r * ulysses + u for r in range(rings)] for u in range(ulysses)]
    axes = []
    for rows in (near, far):
        groups = [dist.new_group(row) for row in rows]  # every rank makes every group
        at = next(i for i, row in enumerate(rows) if axis.rank in row)
        axes.append(Axis(groups[at], rows[at].index(axis.rank), len(rows[at]), axis.traffic))
    return axes[0], axes[1]


def schemes(axis: Axis, ops: tuple[MaterialisedLatent, ...] = MATERIALISED) -> list[LatentScheme]:
    definition, fused = ops
    return [
        LatentRing(definition, axis=axis),
        LatentGather(fused, axis=axis),
        LatentUlysses(definition, axis=axis),
    ]


def tokens(peers: tuple[Row, ...]) -> int:
    return sum(fragment.length for row in peers for fragment in row)


def inputs(total: int, dtype=torch.float64, v_dim: int = V_DIM) -> list[Tensor]:
    """q, latent, shared_key, up_weight, and the gradient of the output, of all ranks."""
    tensors = random_tensors(
        (1, total, HEADS, NOPE + ROPE),
        (1, total, RANK),
        (1, total, ROPE),
        (HEADS, NOPE + v_dim, RANK),
        (1, total, HEADS, v_dim),
    )
    return [x.detach().to(dtype) for x in tensors]


def results(
    op: Callable, tensors: list[Tensor], info: SequenceInfo, scale: float | None = None
) -> list[Tensor]:
    """Output and the gradients of q, latent, shared_key and up_weight."""
    *leaves, grad = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    output = op(*leaves, info, scale=scale)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def whole_results(
    tensors: list[Tensor],
    peers: tuple[Row, ...],
    op: MaterialisedLatent = MATERIALISED[0],
    scale: float | None = None,
) -> list[Tensor]:
    """Those of one rank that holds the packed sequence."""
    return results(op, tensors, whole(peers), scale)


def local(tensors: list[Tensor], info: SequenceInfo) -> list[Tensor]:
    """This rank's tokens of all but the weight, which starts with the heads."""
    at = info.index[0]
    return [x if x.shape[0] == HEADS else x[:, at] for x in tensors]


def rank_results(
    scheme: LatentScheme, tensors: list[Tensor], info: SequenceInfo, scale: float | None = None
) -> list[Tensor]:
    """This rank's results, with the weight gradient of all."""
    *found, grad_weight = results(scheme, local(tensors, info), info, scale)
    group = dist.group.WORLD if len(info.peers) == dist.get_world_size() else scheme.axis.group
    summed = widen(grad_weight)
    dist.all_reduce(summed, group=group)
    return [*found, summed.to(grad_weight.dtype)]


def test_equal_one_rank_on_1_2_and_4():
    on_ranks(4, check_parts_of_four)


def check_parts_of_four(axis: Axis) -> None:
    pair, _ = two_axes(axis, 2)
    single, _ = two_axes(axis, 1)
    ulysses, ring = two_axes(axis, 2)

    def two_levels(axis: Axis, ops: tuple[MaterialisedLatent, ...]) -> list[LatentScheme]:
        inner = LatentRing(ops[0], axis=ring), LatentGather(ops[1], axis=ring)
        return [LatentUlysses(scheme, axis=ulysses) for scheme in inner]

    for part in (single, pair, axis):
        check_equal(part, schemes)
    check_equal(axis, two_levels)


def test_equal_one_rank_on_3():
    on_ranks(3, check_three)


def check_three(axis: Axis) -> None:
    check_equal(axis, schemes)
    check_mutations(axis)
    check_half_precision(axis)


def check_equal(axis: Axis, build: Callable[..., list[LatentScheme]]) -> None:
    """Causal and not, in turns."""
    scale = 0.3 if axis.ranks == 4 else None
    for (_, peers), ops in zip(cases(axis.ranks), cycle((MATERIALISED, FULL)), strict=False):
        info, tensors = rank_info(peers, axis.rank), inputs(tokens(peers))
        expected = whole_results(tensors, peers, ops[0], scale)
        for scheme in build(axis, ops):
            got = rank_results(scheme, tensors, info, scale)
            assert_equal(got, local(expected, info), 1e-10)


def check_mutations(axis: Axis) -> None:
    peers = place([SEQ * axis.ranks], zigzag(axis.ranks, SEQ))
    tensors = inputs(axis.ranks * SEQ, v_dim=NOPE + ROPE)  # as wide as keys, so that they can swap
    ring, gather, ulysses = schemes(axis)
    full_ring, full_gather, _ = schemes(axis, FULL)
    mutations = (
        (take_for_causal, [full_ring, full_gather]),
        (drop_hop, [ring]),
        (swap_gradients, [ring]),
        (lose_weight_gradient, [ring, gather]),
        (count_twice, [ring, gather, ulysses]),
    )
    for mutate, mutated in mutations:
        for scheme in mutated:
            assert not found_wrong(axis, tensors, peers, scheme)
            with pytest.MonkeyPatch.context() as patch:
                mutate(patch)
                assert found_wrong(axis, tensors, peers, scheme), mutate.__name__


def found_wrong(
    axis: Axis, tensors: list[Tensor], peers: tuple[Row, ...], scheme: LatentScheme
) -> bool:
    """Whether any rank sees a difference."""
    info = rank_info(peers, axis.rank)
    reference = FULL[0] if scheme.op in FULL else MATERIALISED[0]
    got = rank_results(scheme, tensors, info)
    differs = torch.zeros(1)
    try:
        assert_equal(got, local(whole_results(tensors, peers, reference), info), 1e-10)
    except AssertionError:
        differs += 1
    dist.all_reduce(differs)
    return bool(differs)


def take_for_causal(patch: pytest.MonkeyPatch) -> None:
    """In the plans alone."""
    for name in ("stops", "fetch", "visible"):
        right = getattr(parallel.latent, name)

        def causal_plan(peers, rank, causal, right=right):
            return right(peers, rank, causal=True)

        patch.setattr(parallel.latent, name, causal_plan)


def drop_hop(patch: pytest.MonkeyPatch) -> None:
    right = parallel.latent.stops

    def stops(*args, **kwargs):
        first, second, *others = right(*args, **kwargs)
        return first, second._replace(needed=False), *others

    patch.setattr(parallel.latent, "stops", stops)


def swap_gradients(patch: pytest.MonkeyPatch) -> None:
    right = EinsumSoftmax.block_backward

    def swapped(*args, **kwargs):
        grad_q, grad_k, grad_v = right(*args, **kwargs)
        return grad_q, grad_v, grad_k

    patch.setattr(EinsumSoftmax, "block_backward", swapped)


def count_twice(patch: pytest.MonkeyPatch) -> None:
    """Gradients that come home."""
    for name in ("shift", "exchange", "sum_scatter"):
        post = getattr(Axis, name)

        def twice(self, x, *args, post=post, **kwargs):
            double = kwargs["direction"] == "backward"
            return post(self, 2 * x if double else x, *args, **kwargs)

        patch.setattr(Axis, name, twice)


def lose_weight_gradient(patch: pytest.MonkeyPatch) -> None:
    """Of a part of the latents of other ranks."""
    right = parallel.latent._expand

    def expand(rows, up_weight, key_dims):
        if len(rows) < SEQ:
            up_weight = up_weight.detach() + 0 * up_weight
        return right(rows, up_weight, key_dims)

    patch.setattr(parallel.latent, "_expand", expand)


def test_messages():
    on_ranks(4, check_messages)


def check_messages(axis: Axis) -> None:
    check_bytes(axis)
    check_no_bytes(axis)
    check_overlap(axis)
    check_share_of_materialised(axis)


def check_bytes(axis: Axis) -> None:
    ulysses, ring = two_axes(axis, 2)
    usp = LatentUlysses(LatentRing(MATERIALISED[1], axis=ring), axis=ulysses)
    predictions = ring_bytes, gather_bytes, ulysses_bytes, usp_bytes
    for name, peers in cases(axis.ranks):
        info, tensors = rank_info(peers, axis.rank), inputs(tokens(peers))
        for scheme, predict in zip([*schemes(axis), usp], predictions, strict=True):
            axis.traffic.take()
            results(scheme, local(tensors, info), info)
            expected = predict(peers, axis.rank)
            assert +axis.traffic.take() == +expected, (name, type(scheme))  # without zeros
            if name == "zigzag one" and axis.rank == 0 and scheme is not usp:
                # Of all ranks this receives the most: every latent of the others.
                latents = 3 * info.shape[1] * WIDTH * 8
                assert latents in (x for key, x in expected.items() if key[2] == "forward")


def readers(peers: tuple[Row, ...]) -> dict[int, tuple[int, list[int]]]:
    """By token: the rank that holds it, and the hops from there to those that see it."""
    ranks, last = len(peers), {}
    for rank, row in enumerate(peers):
        for f in row:
            for index in range(f.index, f.index + f.length):
                last[rank, f.start] = max(index, last.get((rank, f.start), -1))
    found = {}
    for owner, row in enumerate(peers):
        for f in row:
            for index in range(f.index, f.index + f.length):
                hops = [
                    hop
                    for hop in range(1, ranks)
                    if last.get(((owner + hop) % ranks, f.start), -1) > index
                ]
                found[index] = owner, hops
    return found


def count(kind: str, forward: int, backward: int) -> Counter:
    """Of so many fp64 numbers."""
    directions = {"forward": forward, "backward": backward}
    return Counter({(kind, "latent", name): 8 * x for name, x in directions.items()})


def ring_rows(peers: tuple[Row, ...], rank: int) -> tuple[int, int, int]:
    """Latents received forward; backwards, where they need not reach the owner; gradients."""
    forward = backward = gradients = 0
    for owner, hops in readers(peers).values():
        hop, reach = (rank - owner) % len(peers), max(hops, default=0)
        forward += 1 <= hop <= reach
        backward += 1 <= hop < reach
        gradients += hop < reach
    return forward, backward, gradients


def ring_bytes(peers: tuple[Row, ...], rank: int) -> Counter:
    forward, backward, gradients = ring_rows(peers, rank)
    return count("shift", forward * WIDTH, (backward + gradients) * WIDTH)


def gather_bytes(peers: tuple[Row, ...], rank: int) -> Counter:
    held = readers(peers).values()
    forward = sum((rank - owner) % len(peers) in hops for owner, hops in held)
    backward = sum(len(hops) for owner, hops in held if owner == rank)
    return count("all_to_all", forward * WIDTH, backward * WIDTH)


def ulysses_bytes(peers: tuple[Row, ...], rank: int) -> Counter:
    """All or, where no document is on two ranks, nothing."""
    if not any(hops for _, hops in readers(peers).values()):
        return Counter()
    return heads_bytes(tokens(peers[:1]), len(peers), rank)


def heads_bytes(n: int, ranks: int, rank: int) -> Counter:
    own, q_dim = HEADS // ranks + (rank < HEADS % ranks), NOPE + ROPE
    there, back = (ranks - 1) * n * own, n * (HEADS - own)
    heads = count("all_to_all", there * q_dim + back * V_DIM, there * V_DIM + back * q_dim)
    latents = (ranks - 1) * n * WIDTH
    return heads + count("all_gather", latents, 0) + count("reduce_scatter", 0, latents)


def usp_bytes(peers: tuple[Row, ...], rank: int) -> Counter:
    """A ring of two pairs."""
    if not any(hops for _, hops in readers(peers).values()):
        return Counter()
    pairs = peers[0] + peers[1], peers[2] + peers[3]
    return heads_bytes(tokens(peers[:1]), 2, rank % 2) + ring_bytes(pairs, rank // 2)


def check_no_bytes(axis: Axis) -> None:
    """Where every document is whole on a rank."""
    tensors = inputs(axis.ranks * SEQ)
    info = rank_info(place([SEQ, 4, 8, 12], contiguous(4, SEQ)), axis.rank)
    axis.traffic.trace = []
    for scheme in schemes(axis):
        results(scheme, local(tensors, info), info)
    assert axis.traffic.trace == [] and not axis.traffic.take()
    axis.traffic.trace = None


class TracedSoftmax(EinsumSoftmax):
    """Notes when a block is computed, and how many of the received buffers live then."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic, self.received, self.most = traffic, weakref.WeakSet(), 0

    def block(self, *args, **kwargs):
        self.traffic.note("block", "")
        self.most = max(self.most, len(self.received))
        return super().block(*args, **kwargs)

    def block_backward(self, *args, **kwargs):
        self.traffic.note("block", "")
        return super().block_backward(*args, **kwargs)


def check_overlap(axis: Axis) -> None:
    """Messages are posted before the block that hides them; a ring holds two received buffers."""
    softmax = TracedSoftmax(axis.traffic)
    op, peers = MaterialisedLatent(softmax), place([4 * SEQ], zigzag(4, SEQ))
    info, post = rank_info(peers, axis.rank), Axis.shift

    def shift(*args, **kwargs):
        pending = post(*args, **kwargs)
        softmax.received.add(pending._tensor)
        return pending

    expected = {
        LatentRing: "post block wait post block wait post block wait block "
        "post block post wait post block wait post wait block wait post block wait",
        LatentGather: "post block wait block block block block block block post block wait",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axis, "shift", shift)
        for scheme, events in expected.items():
            axis.traffic.trace = []
            results(scheme(op, axis=axis), local(inputs(4 * SEQ), info), info)
            assert [event for event, _ in axis.traffic.trace] == events.split()
    axis.traffic.trace = None
    assert softmax.most == 2


def check_share_of_materialised(axis: Axis) -> None:
    """Kimi Linear's shapes in bf16: gradients travel in fp32."""
    heads, nope, rope, v_dim, rank, n = 32, 128, 64, 128, 512, SEQ
    info = rank_info(place([axis.ranks * n], zigzag(axis.ranks, n)), axis.rank)
    shapes = (
        ((1, n, heads, nope + rope), (1, n, rank), (1, n, rope), (heads, nope + v_dim, rank)),
        ((1, n, heads, nope + rope), (1, n, heads, nope + rope), (1, n, heads, v_dim)),
    )
    forward, both = [], []
    for op, dims in zip((LatentRing, RingAttention), shapes, strict=True):
        tensors = random_tensors(*dims, dtype=torch.bfloat16)
        inner = MATERIALISED[0] if op is LatentRing else EinsumSoftmax()
        axis.traffic.take()
        op(inner, axis=axis)(*tensors, info).sum().backward()
        traffic = axis.traffic.take()
        forward.append(sum(x for key, x in traffic.items() if key[2] == "forward"))
        both.append(traffic.total())
    assert 15 * forward[0] < forward[1] and 12 * both[0] < both[1]
    *latents, gradients = ring_rows(info.peers, axis.rank)
    assert both[0] == (rank + rope) * (2 * sum(latents) + 4 * gradients)


def check_half_precision(axis: Axis) -> None:
    """No further from fp64 than twice the same math on one rank, as bf16 and under autocast."""
    peers = place([200, 80], zigzag(3, 96))
    info = rank_info(peers, axis.rank)
    tensors = [x.bfloat16() for x in inputs(tokens(peers))]
    exact = local(whole_results([x.double() for x in tensors], peers), info)
    single = errors(local(whole_results(tensors, peers, MATERIALISED[1]), info), exact)
    for scheme in schemes(axis):
        got = rank_results(scheme, tensors, info)
        assert all(x.dtype == torch.bfloat16 for x in got)
        assert all(x <= 2 * y for x, y in zip(errors(got, exact), single, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            got = rank_results(scheme, [x.float() for x in tensors], info)
        assert got[0].dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in got[1:])
        assert all(x <= 2 * y for x, y in zip(errors(got, exact), single, strict=True))


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Roots of the summed squares of the differences on all ranks."""
    pairs = zip(got, exact, strict=True)
    total = torch.stack([(x.double() - y).square().sum() for x, y in pairs])
    dist.all_reduce(total)
    return total.sqrt().tolist()


def test_refusals():
    peers = place([2 * SEQ], contiguous(2, SEQ))
    info = rank_info(peers, 0)
    tensors = local(inputs(2 * SEQ), info)[:4]
    axis = Axis(None, 0, 2, Traffic())
    for scheme in schemes(axis):
        with pytest.raises(ValueError, match="got key_info"):
            scheme(*tensors, info, key_info=info.history(SEQ))
        with pytest.raises(ValueError, match="1 rows and 0 peers"):
            scheme(*tensors, info.row(0))
    op = MATERIALISED[0]
    with pytest.raises(ValueError, match="rank 0 of 3 got the row of rank 0 of 2"):
        LatentRing(op, axis=Axis(None, 0, 3, Traffic()))(*tensors, info)
    four = place([4 * SEQ], contiguous(4, SEQ))
    info = rank_info(four, 0)
    with pytest.raises(ValueError, match="MaterialisedLatent inside ulysses=2 of 4 context ranks"):
        LatentUlysses(op, axis=axis)(*tensors, info)
