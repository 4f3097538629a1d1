"""The cost model: what it predicts is what the schemes' counters say, on every rank and layout."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.ops.conv import ShiftedConv
from models.ops.decayed_sum import TokenLoopDecayedSum
from models.ops.delta_rule import TokenLoopDeltaRule
from models.ops.latent import MaterialisedLatent
from models.ops.routed_softmax import TiledRoutedAttention
from models.ops.softmax import EinsumSoftmax
from models.sequence import Fragment, Peers, SequenceInfo
from parallel.chains import scan_routes
from parallel.collectives import Axis
from parallel.cost import (
    Bytes,
    Outer,
    halo,
    halo_bytes,
    latent_bytes,
    latent_usp_bytes,
    links,
    moved,
    planned,
    planned_halo,
    planned_links,
    softmax_bytes,
    softmax_usp_bytes,
    state_heads_bytes,
    states_bytes,
)
from parallel.gather import GatherAttention
from parallel.halo import HaloExchange
from parallel.latent import LatentGather, LatentRing, LatentUlysses
from parallel.layout import plan_layout
from parallel.ring import RingAttention
from parallel.shapes import (
    KEPT,
    ConvShape,
    LatentShape,
    RecurrenceShape,
    Shape,
    SoftmaxShape,
    record_shapes,
)
from parallel.state_passing import StatePassing, UlyssesRecurrence
from parallel.ulysses import UlyssesAttention
from tests.parallel.layouts import Row, cases, rank_info
from tests.parallel.ranks import on_ranks

SOFTMAX = SoftmaxShape(heads=8, kv_heads=4, dim=3, v_dim=2)
ROUTED = replace(SOFTMAX, kept=KEPT)
LATENTS = replace(ROUTED, v_dim=SOFTMAX.dim, shared=True)
LATENT = LatentShape(heads=4, dim=5, rope=2, v_dim=3, rank=6)
RECURRENCE = RecurrenceShape(heads=4, key_dim=3, value_dim=2, decays=3, transition=9)
SUM = RecurrenceShape(heads=4, key_dim=3, value_dim=2, decays=1, transition=1)
CONV = ConvShape(channels=5, width=4)
OUTERS: tuple[Outer, ...] = ("ring", "gather")
SCHEMES: dict[str, dict[str, Callable]] = {
    "softmax": {"ring": RingAttention, "gather": GatherAttention},
    "latent": {"ring": LatentRing, "gather": LatentGather},
}


def inputs(shape: Shape, tokens: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Of the operation of this shape, before the `SequenceInfo`; None for values that are keys."""
    match shape:
        case SoftmaxShape():
            q, kv = (tokens, shape.heads, shape.dim), (tokens, shape.kv_heads)
            dims: list[tuple[int, ...]] = [q, (*kv, shape.dim), (*kv, shape.v_dim)]
            dims += [kv] if shape.kept < 1 else []
        case LatentShape():
            up = shape.heads, shape.dim - shape.rope + shape.v_dim, shape.rank
            q = tokens, shape.heads, shape.dim
            dims = [q, (tokens, shape.rank), (tokens, shape.rope), up]
        case RecurrenceShape():
            k, v = (tokens, shape.heads, shape.key_dim), (tokens, shape.heads, shape.value_dim)
            heads = (tokens, shape.heads)
            dims = [k, k, v, (*heads, shape.decays), heads]
        case ConvShape():
            dims = [(tokens, shape.channels), (shape.channels, shape.width)]
    weight = {LatentShape: 3, ConvShape: 1}.get(type(shape))
    none = 2 if isinstance(shape, SoftmaxShape) and shape.shared else None
    return [
        torch.rand(*(d if i == weight else (1, *d)), dtype=dtype).neg_().requires_grad_()
        if i != none
        else None
        for i, d in enumerate(dims)
    ]


def counted(op: nn.Module, axis: Axis, shape: Shape, info: SequenceInfo, dtype) -> Bytes:
    """What this rank received in one forward and backward."""
    axis.traffic.take()
    output = op(*inputs(shape, info.shape[1], dtype), info)
    output = output if isinstance(output, Tensor) else output.output
    output.sum().backward()
    taken = axis.traffic.take()
    by = {
        way: sum(n for (*_, w), n in taken.items() if w == way) for way in ("forward", "backward")
    }
    return Bytes(**by)


def one_document(ranks: int, tokens: int) -> tuple[Row, ...]:
    document = Fragment(ranks * tokens, 0)
    return plan_layout([document], ranks=ranks, strategy="zigzag").ranks


def test_counters_are_as_planned_and_formulas_as_counted():
    on_ranks(4, check_plans)


def check_plans(axis: Axis) -> None:
    layouts = [peers for _, peers in list(cases(axis.ranks))[::2]] + [one_document(axis.ranks, 8)]
    for peers in layouts:
        info = rank_info(peers, axis.rank)
        for op, predict in predictions(axis, peers):
            shape, expected = predict(axis.rank)
            assert counted(op, axis, shape, info, torch.float64) == expected, (op, peers)


Predictions = list[tuple[nn.Module, Callable[[int], tuple[Shape, Bytes]]]]


def attention(axis: Axis, peers: tuple[Row, ...], *, causal: bool) -> Predictions:
    softmax = EinsumSoftmax(causal=causal)
    latent = MaterialisedLatent(softmax)

    def of_softmax(outer):
        return lambda rank: (
            SOFTMAX,
            softmax_bytes(SOFTMAX, planned(outer, peers, rank, causal=causal), size=8),
        )

    def of_latent(outer):
        return lambda rank: (
            LATENT,
            latent_bytes(LATENT, planned(outer, peers, rank, causal=causal), outer, size=8),
        )

    return [
        *((SCHEMES["softmax"][o](softmax, axis=axis), of_softmax(o)) for o in OUTERS),
        *((SCHEMES["latent"][o](latent, axis=axis), of_latent(o)) for o in OUTERS),
    ]


def predictions(axis: Axis, peers: tuple[Row, ...]) -> Predictions:
    def of_states(shape):
        return lambda rank: (shape, states_bytes(shape, planned_links(peers, rank), size=8))

    def of_halo(rank):
        return CONV, halo_bytes(CONV, planned_halo(peers, rank, reach=CONV.width - 1), size=8)

    return [
        *attention(axis, peers, causal=True),
        *attention(axis, peers, causal=False),
        (StatePassing(TokenLoopDeltaRule(), axis=axis), of_states(RECURRENCE)),
        (StatePassing(TokenLoopDecayedSum(), axis=axis), of_states(SUM)),
        (HaloExchange(ShiftedConv(), axis=axis), of_halo),
    ]


def test_heads_first_is_as_counted():
    on_ranks(4, check_heads)


def check_heads(axis: Axis) -> None:
    tokens = 8
    info = rank_info(one_document(axis.ranks, tokens), axis.rank)
    numbers = {"tokens": tokens, "ranks": axis.ranks, "size": 4}
    softmax, latent = EinsumSoftmax(), MaterialisedLatent(EinsumSoftmax())
    for op, shape, expected in (
        (
            UlyssesAttention(softmax, axis=axis),
            SOFTMAX,
            softmax_usp_bytes(SOFTMAX, "ring", ulysses=axis.ranks, **numbers),
        ),
        (
            LatentUlysses(latent, axis=axis),
            LATENT,
            latent_usp_bytes(LATENT, "ring", ulysses=axis.ranks, **numbers),
        ),
        (
            UlyssesRecurrence(TokenLoopDeltaRule(), axis=axis),
            RECURRENCE,
            state_heads_bytes(RECURRENCE, **numbers),
        ),
        (
            UlyssesRecurrence(TokenLoopDecayedSum(), axis=axis),
            SUM,
            state_heads_bytes(SUM, **numbers),
        ),
    ):
        assert counted(op, axis, shape, info, torch.float32) == expected, op


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_formulas_are_the_largest_of_the_ranks(ranks: int) -> None:
    peers = one_document(ranks, 16)
    for outer in OUTERS:
        largest = moved(outer, tokens=16, ranks=ranks)
        plans = [planned(outer, peers, rank) for rank in range(ranks)]
        assert largest == tuple(map(max, zip(*plans, strict=True)))
        assert {largest} == {planned(outer, peers, r, causal=False) for r in range(ranks)}
    summaries = [planned_links(peers, rank) for rank in range(ranks)]
    assert links(ranks) == tuple(map(max, zip(*summaries, strict=True)))
    rows = [planned_halo(peers, rank, reach=3) for rank in range(ranks)]
    assert halo(ranks, reach=3) == tuple(map(max, zip(*rows, strict=True)))


@pytest.mark.parametrize("ranks", [2, 3, 8, 40])
def test_a_scan_receives_no_more_than_predicted(ranks: int) -> None:
    peers = Peers(one_document(ranks, 4))
    received = [
        sum(len(forward.incoming) for forward, _ in scan_routes(peers, rank))
        for rank in range(ranks)
    ]
    assert max(received) <= links(ranks, scan=True).updates <= max(received) + 4


def test_kimi_linear_48b() -> None:
    """Design 4: 576 values of a token instead of 10,240; 4 MiB a summary, at any length."""
    latent = LatentShape(heads=32, dim=192, rope=64, v_dim=128, rank=512)
    keys = SoftmaxShape(heads=32, kv_heads=32, dim=192, v_dim=128)
    move = moved("ring", tokens=8192, ranks=8)
    ours = latent_bytes(latent, move, "ring", size=2)
    theirs = softmax_bytes(keys, move, size=2)
    assert ours.forward == 7 * 8192 * 576 * 2
    assert theirs.forward / ours.forward == pytest.approx(10_240 / 576)
    states = RecurrenceShape(heads=32, key_dim=128, value_dim=128, decays=128, transition=128 * 128)
    assert states_bytes(states, links(2), size=2).forward == 4 * 2**20


def test_shapes_are_those_of_the_operations() -> None:
    ops = {
        SOFTMAX: EinsumSoftmax(),
        ROUTED: TiledRoutedAttention(chunk=2),
        LATENTS: TiledRoutedAttention(chunk=2),
        LATENT: MaterialisedLatent(EinsumSoftmax()),
        RECURRENCE: TokenLoopDeltaRule(),
        SUM: TokenLoopDecayedSum(),
        CONV: ShiftedConv(),
    }
    info = SequenceInfo.from_lengths([[6]])
    for shape, op in ops.items():
        returned: list = []

        def run(shape=shape, op=op, returned=returned) -> None:
            returned.append(op(*inputs(shape, 6, torch.float32), info))

        run()
        assert record_shapes(op, run) == {shape}
        real, fake = ([x] if isinstance(x, Tensor) else [*x] for x in returned)
        assert [x.shape for x in real] == [x.shape for x in fake]
