"""Routed attention: the tiled form against the dense definition, and that against other oracles."""

import pytest
import torch
from torch import Tensor

from models.ops import routed_blocks
from models.ops.routed import ABSENT, RoutedKeys
from models.ops.routed_grid import chunk_grid
from models.ops.routed_softmax import DenseRoutedAttention, TiledRoutedAttention
from models.ops.softmax import EinsumSoftmax
from models.sequence import Fragment, SequenceInfo, Visibility
from tests.helpers import assert_equal, outputs_and_gradients, random_tensors

CHUNK, HEADS, KV_HEADS, DIM, V_DIM = 4, 6, 3, 5, 7
# As ranks of a context-parallel run hold them: from a chunk's start on, and back after a gap.
SCATTERED = SequenceInfo.from_fragments(
    [
        [Fragment(8, 40, 4), Fragment(7, 100, 64), Fragment(4, 200), Fragment(13, 300, 60)],
        [Fragment(12, 8, 8), Fragment(14, 28, 28), Fragment(6, 90, padding=True)],
    ]
)
INFOS = {
    "a token": SequenceInfo.from_lengths([[1]]),
    "a chunk": SequenceInfo.from_lengths([[4], [4]]),
    "one document": SequenceInfo.from_lengths([[31], [31]]),
    "packed": SequenceInfo.from_lengths([[3, 1, 10, 14], [28], [9, 13]], padding=[0, 0, 6]),
    "scattered": SCATTERED,
}


def routing(info: SequenceInfo, share: float = 0.5) -> Tensor:
    """[batch, seq, kv heads] keep, constant in chunks; heads differ, the last keeps nothing."""
    grid = chunk_grid(info, CHUNK)
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(*grid.shape, KV_HEADS, generator=generator) < share
    kept[:, :, -1] = False
    return grid.spread(kept.double())


def inputs(info: SequenceInfo, keep: Tensor) -> list[Tensor]:
    batch, seq = info.shape
    sizes = (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM)
    return [*random_tensors(*((batch, seq, *size) for size in sizes)), keep.requires_grad_()]


def run(op, info: SequenceInfo, keep: Tensor) -> list[Tensor]:
    """Output and gradients, that of keep by chunk."""
    *rest, gate = outputs_and_gradients(lambda *x: op(*x, info), inputs(info, keep))
    return [*rest, chunk_grid(info, CHUNK).cut(gate).sum(2)]


@pytest.fixture(params=["one tile", "tiles of a chunk"])
def tile_size(request, monkeypatch):
    if request.param == "tiles of a chunk":
        monkeypatch.setattr(routed_blocks, "CPU_SCORES", 1)


@pytest.mark.parametrize("counterfactual", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0, 0.0])
@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_tiles_equal_the_definition(info, share, counterfactual, tile_size):
    keywords = {"chunk": CHUNK, "counterfactual": counterfactual}
    keep = routing(info, share)
    got = run(TiledRoutedAttention(**keywords), info, keep)
    assert_equal(got, run(DenseRoutedAttention(**keywords), info, keep), 1e-10)
    assert_equal(got[-1:], [got[-1] * (keep_by_chunk(info, keep) if not counterfactual else 1)], 0)


def keep_by_chunk(info: SequenceInfo, keep: Tensor) -> Tensor:
    return chunk_grid(info, CHUNK).cut(keep)[:, :, 0].detach()


@pytest.mark.parametrize("op", [DenseRoutedAttention, TiledRoutedAttention])
@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_keys_that_are_the_values_equal_a_copy_of_them(info, op, tile_size):
    """Their gradient is that of both."""
    attention = op(chunk=CHUNK, counterfactual=True)
    q, k, _, keep = inputs(info, routing(info))

    def results(*copies: Tensor | None) -> list[Tensor]:
        output = attention(q, k, *copies, keep, info)
        *grads, gate = torch.autograd.grad(output.square().sum(), [q, k, keep])
        return [output, *grads, chunk_grid(info, CHUNK).cut(gate).sum(2)]

    assert_equal(results(None), results(k), 1e-12)


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_without_the_own_chunk(info):
    keywords = {"chunk": CHUNK, "own": False, "counterfactual": True}
    got = run(TiledRoutedAttention(**keywords), info, routing(info))
    assert_equal(got, run(DenseRoutedAttention(**keywords), info, routing(info)), 1e-10)


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_definition_equals_masked_softmax(info):
    keep = routing(info)
    q, k, v, _ = inputs(info, keep)
    block = info.index - info.positions % CHUNK
    expected = EinsumSoftmax()(q, k, v, info, visibility=Visibility(block, block, keep > 0))
    assert_equal([DenseRoutedAttention(chunk=CHUNK)(q, k, v, keep, info)], [expected], 1e-12)


@pytest.mark.parametrize("counterfactual", [False, True])
def test_gate_gradient_is_that_of_keeping_a_little_more_or_less(counterfactual):
    info = INFOS["packed"]
    grid = chunk_grid(info, CHUNK)
    keep = keep_by_chunk(info, routing(info))
    q, k, v, _ = (x.detach() for x in inputs(info, routing(info)))
    definition = DenseRoutedAttention(chunk=CHUNK, counterfactual=True)
    weights = random_tensors((*info.shape, HEADS, V_DIM))[0].detach()

    def loss(chunks: Tensor) -> float:
        return float((definition(q, k, v, grid.spread(chunks), info) * weights).sum())

    gates = grid.spread(keep).requires_grad_()
    op = TiledRoutedAttention(chunk=CHUNK, counterfactual=counterfactual)
    (grad,) = torch.autograd.grad((op(q, k, v, gates, info) * weights).sum(), gates)
    grad, step = grid.cut(grad).sum(2), 1e-6
    assert grad.abs().max() > 0.1
    for place in [(0, 2, 0), (1, 1, 1), (1, 3, 0), (1, 2, 2), (2, 0, 0), (2, 3, 1)]:
        moved = torch.zeros_like(keep)
        moved[place] = step
        numeric = (loss(keep + moved) - loss(keep - moved)) / (2 * step)
        if counterfactual or keep[place]:
            assert abs(numeric - grad[place]) < 1e-6 * max(1, abs(numeric)), place
        else:
            assert grad[place] == 0, place


@pytest.mark.parametrize("op", [DenseRoutedAttention, TiledRoutedAttention])
def test_kept_chunks_of_the_past_equal_a_longer_row(op):
    info = SequenceInfo.from_lengths([[31], [31]])
    keep = routing(info).detach()
    q, k, v, _ = (x.detach() for x in inputs(info, keep))
    attention = op(chunk=CHUNK)
    whole = attention(q, k, v, keep, info)
    chunks = [x[:, :16].unflatten(1, (4, CHUNK)).permute(0, 3, 1, 2, 4) for x in (k, v)]
    kept = keep[:, :16:CHUNK].transpose(1, 2) > 0
    start = torch.arange(0, 16, CHUNK).where(kept, torch.tensor(ABSENT))
    past = RoutedKeys(tuple(chunks), start)
    rest = [x[:, 16:] for x in (q, k, v, keep)]
    later = attention(*rest, SequenceInfo.span(2, 16, 31), past=past)
    assert_equal([later], [whole[:, 16:]], 1e-12)
    whole = attention(q, k, k, keep, info)
    q, k, _, keep = rest
    past = RoutedKeys((chunks[0],), start)
    later = attention(q, k, None, keep, SequenceInfo.span(2, 16, 31), past=past)
    assert_equal([later], [whole[:, 16:]], 1e-12)


def test_only_kept_chunks_are_multiplied():
    """Time follows the kept share, by head; that of a head without kept chunks is the own chunk."""
    info = SequenceInfo.from_lengths([[32 * CHUNK]])
    grid = chunk_grid(info, CHUNK)
    kept = torch.zeros(*grid.shape, KV_HEADS)
    kept[:, 3, 0], kept[:, ::2, 1] = 1, 1
    index = grid.start.expand(KV_HEADS, -1).where(kept[0].T > 0, torch.tensor(ABSENT))
    sight = routed_blocks.Sight(*(x.expand(KV_HEADS, -1) for x in (grid.document, grid.start)))
    plan = routed_blocks.Plan.make(index, sight, CHUNK, CHUNK)
    assert [group.keys for group in plan.groups] == [1, 16]
    assert [group.rows.tolist() for group in plan.groups] == [[0], [1]]


def test_a_row_that_goes_on_inside_a_chunk_is_refused():
    info = SequenceInfo.span(1, 3, 9)
    keep = torch.ones(1, 6, KV_HEADS, dtype=torch.float64)
    message = "position 3 of their document; routed layers allow multiples of their chunk of 4"
    with pytest.raises(ValueError, match=message):
        TiledRoutedAttention(chunk=CHUNK)(*inputs(info, keep), info)


def test_bfloat16_stays_and_is_rounded_once():
    info = INFOS["packed"]
    *tensors, keep = (x.detach() for x in inputs(info, routing(info)))
    low = [x.bfloat16() for x in tensors]
    op = TiledRoutedAttention(chunk=CHUNK)
    output = op(*low, keep, info)
    assert torch.equal(output, op(*(x.float() for x in low), keep, info).bfloat16())
