"""Softmax attention: the definition by hand, and every fast path against it in fp64."""

import math

import pytest
import torch
from torch import Tensor

from models.ops.flash import VarlenSoftmax, whole_documents
from models.ops.softmax import AtenSoftmax, EinsumSoftmax, TiledSoftmax, merge_
from models.ops.tiles import Tile, tiles
from models.sequence import Fragment, SequenceInfo, Visibility
from tests.helpers import INFOS, assert_equal, outputs_and_gradients, random_tensors

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 6, 3


class DenseVarlen(VarlenSoftmax):
    """What a CUDA kernel over sequences of unequal lengths does, on the definition."""

    def infos(self, lengths, key_lengths, causal):
        def info(lengths, position):
            spans = lengths.bounds.diff().tolist()
            rows = [Fragment(n, 100 * i + position, position) for i, n in enumerate(spans)]
            return SequenceInfo.from_fragments([rows])

        # Keys that all come before the queries are all seen.
        return info(lengths, 0 if causal else 50), info(key_lengths, 0)

    def varlen(self, q, k, v, lengths, key_lengths, causal, scale, window=None):
        infos = self.infos(lengths, key_lengths, causal)
        tensors = (x.unsqueeze(0) for x in (q, k, v))
        output, lse = EinsumSoftmax().block(*tensors, *infos, scale=scale, window=window)
        return output[0], lse[0].T

    def varlen_backward(
        self, grad, q, k, v, output, lse, lengths, key_lengths, causal, scale, window=None
    ):
        infos = self.infos(lengths, key_lengths, causal)
        tensors = (x.unsqueeze(0) for x in (grad, q, k, v, output, lse.T))
        grads = EinsumSoftmax().block_backward(*tensors, *infos, scale=scale, window=window)
        return tuple(x[0] for x in grads)

    def check_dtype(self, dtype):
        pass


def inputs(info: SequenceInfo, key_info: SequenceInfo, **kwargs) -> list[Tensor]:
    (batch, seq), key_seq = info.shape, key_info.shape[1]
    shapes = (
        (batch, seq, HEADS, DIM),
        (batch, key_seq, KV_HEADS, DIM),
        (batch, key_seq, KV_HEADS, V_DIM),
    )
    return random_tensors(*shapes, **kwargs)


def by_hand(q, k, v, info, *, causal, window=None, visibility=None, scale=DIM**-0.5):
    """One query at a time, over the keys that the contract lets it see."""
    documents = [[f.start for f in row for _ in range(f.length)] for row in info.fragments]
    output = torch.zeros(*q.shape[:3], V_DIM, dtype=q.dtype)
    for b, i, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        head, seen = h // (HEADS // KV_HEADS), []
        for j in range(k.shape[1]):
            back = info.index[b, i] - info.index[b, j]
            sees = documents[b][i] == documents[b][j] and (back >= 0 or not causal)
            sees = sees and (window is None or abs(back) < window)
            if visibility is not None:
                own = visibility.query_block[b, i] == visibility.key_block[b, j]
                sees = sees and (own or visibility.keep[b, j, head])
            if sees:
                seen.append(j)
        if seen:
            weights = (k[b, seen, head] @ q[b, i, h] * scale).softmax(0)
            output[b, i, h] = weights @ v[b, seen, head]
    return output


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", INFOS)
def test_definition(name, causal):
    info, op = INFOS[name], EinsumSoftmax(causal=causal)
    tensors = inputs(info, info)
    got = outputs_and_gradients(lambda *x: op(*x, info), tensors)
    expected = outputs_and_gradients(lambda *x: by_hand(*x, info, causal=causal), tensors)
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["unequal rows", "scattered"])
@pytest.mark.parametrize("masks", [{"window"}, {"visibility"}, {"window", "visibility"}, set()])
def test_definition_masks_and_scale(name, masks, causal):
    info, op = INFOS[name], EinsumSoftmax(causal=causal)
    tensors = inputs(info, info)
    block = info.index // 3
    keep = torch.rand(*info.shape, KV_HEADS, generator=torch.Generator().manual_seed(2)) < 0.4
    every = {"window": 5, "visibility": Visibility(block, block, keep)}
    kwargs = {mask: every[mask] for mask in masks} | {"scale": 0.7}
    got = outputs_and_gradients(lambda *x: op(*x, info, **kwargs), tensors)
    expected = outputs_and_gradients(lambda *x: by_hand(*x, info, causal=causal, **kwargs), tensors)
    assert_equal(got, expected, 1e-12)

    # The formulas of block_backward against autograd through the definition.
    q, k, v = (x.detach() for x in tensors)
    output, lse = op.block(q, k, v, info, info, **kwargs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    grads = op.block_backward(grad, q, k, v, output, lse, info, info, **kwargs)
    assert_equal(grads, expected[1:], 1e-12)


fused = pytest.mark.parametrize(
    "op",
    [kind(causal=causal) for kind in (AtenSoftmax, DenseVarlen) for causal in (True, False)],
    ids=lambda op: f"{type(op).__name__} {'causal' if op.causal else 'full'}",
)


@fused
@pytest.mark.parametrize("name", INFOS)
def test_fused_equals_definition(op, name):
    info, reference = INFOS[name], EinsumSoftmax(causal=op.causal)
    tensors = inputs(info, info)
    got = outputs_and_gradients(lambda *x: op(*x, info), tensors)
    assert_equal(got, outputs_and_gradients(lambda *x: reference(*x, info), tensors), 1e-12)


QUERIES_AND_KEYS = {
    "decoding": (SequenceInfo.span(2, 20, 21), SequenceInfo.span(2, 0, 21)),
    "chunked prefill": (SequenceInfo.span(2, 12, 21), SequenceInfo.span(2, 0, 21)),
    "window of keys": (SequenceInfo.span(1, 12, 21), SequenceInfo.span(1, 4, 15)),
    "as many keys before": (SequenceInfo.span(1, 12, 21), SequenceInfo.span(1, 3, 12)),
    "keys behind": (SequenceInfo.span(1, 12, 21), SequenceInfo.span(1, 15, 30)),
    "later keys only": (SequenceInfo.span(1, 12, 21), SequenceInfo.span(1, 21, 30)),
    "scattered keys": (INFOS["unequal rows"].row(3), INFOS["scattered"].row(1)),
    "gathered": (INFOS["scattered"].row(0), SequenceInfo.from_lengths([[37, 23, 1]])),
}


@fused
@pytest.mark.parametrize("name", QUERIES_AND_KEYS)
def test_block_equals_definition(op: TiledSoftmax, name):
    info, key_info = QUERIES_AND_KEYS[name]
    tensors = inputs(info, key_info)
    detached = [x.detach() for x in tensors]
    reference = EinsumSoftmax(causal=op.causal)
    expected = reference.block(*detached, info, key_info, scale=0.4)
    assert_equal(op.block(*detached, info, key_info, scale=0.4), expected, 1e-12)

    # Gradients under an output and lse that also other keys went into.
    output, lse = (x.clone() for x in expected)
    others, other_lse = random_tensors(output.shape, lse.shape)
    merge_(output, lse, others.detach(), other_lse.detach())
    saved = (torch.cos(output), *detached, output, lse, info, key_info)
    got = op.block_backward(*saved, scale=0.4)
    assert_equal(got, reference.block_backward(*saved, scale=0.4), 1e-12)

    def attend(op):
        return lambda *x: op(*x, info, key_info=key_info, scale=0.4)

    got = outputs_and_gradients(attend(op), tensors)
    assert_equal(got, outputs_and_gradients(attend(reference), tensors), 1e-12)


WINDOWED = {name: (info, info) for name, info in INFOS.items()} | QUERIES_AND_KEYS


@pytest.mark.parametrize("op", [AtenSoftmax(), DenseVarlen()], ids=["aten", "varlen"])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows(op: TiledSoftmax, name):
    info, key_info = WINDOWED[name]
    tensors = inputs(info, key_info)

    def attend(op, window):
        return lambda *x: op(*x, info, key_info=key_info, window=window, scale=0.4)

    for window in (1, 2, 5, 40):
        got = outputs_and_gradients(attend(op, window), tensors)
        expected = outputs_and_gradients(attend(EinsumSoftmax(), window), tensors)
        assert_equal(got, expected, 1e-12)


def test_a_window_costs_what_it_shows():
    (row,) = SequenceInfo.from_lengths([[3000]]).fragments
    area = sum(
        (tile.q_stop - tile.q_start) * (tile.k_stop - tile.k_start)
        for tile in tiles(row, row, causal=True, window=16)
    )
    assert area < 2 * 3000 * 16


def test_blocks_merge_to_the_whole():
    info, cut = SequenceInfo.span(2, 0, 12), 5
    q, k, v = (x.detach() for x in inputs(info, info))
    whole = EinsumSoftmax().block(q, k, v, info, info)
    output, lse = torch.zeros_like(whole[0]), torch.full_like(whole[1], -math.inf)
    grads = []
    for span in (slice(cut, 12), slice(0, cut)):
        keys = SequenceInfo.span(2, span.start, span.stop)
        merge_(output, lse, *AtenSoftmax().block(q, k[:, span], v[:, span], info, keys))
    assert_equal((output, lse), whole, 1e-12)
    for span in (slice(0, cut), slice(cut, 12)):
        keys = SequenceInfo.span(2, span.start, span.stop)
        saved = (torch.cos(output), q, k[:, span], v[:, span], output, lse)
        grads.append(AtenSoftmax().block_backward(*saved, info, keys))
    parts = list(zip(*grads, strict=True))
    got = sum(parts[0]), torch.cat(parts[1], dim=1), torch.cat(parts[2], dim=1)
    expected = EinsumSoftmax().block_backward(torch.cos(output), q, k, v, *whole, info, info)
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    """At most twice the error that the definition makes on the same rounded inputs, and a step of
    the output's own rounding."""
    info = INFOS["scattered"]
    narrow = inputs(info, info, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in narrow]
    truth = outputs_and_gradients(lambda *x: EinsumSoftmax()(*x, info), exact)
    got = outputs_and_gradients(lambda *x: AtenSoftmax()(*x, info), narrow)
    reference = outputs_and_gradients(lambda *x: EinsumSoftmax()(*x, info), narrow)
    for x, y, z in zip(got, reference, truth, strict=True):
        step = torch.finfo(dtype).eps * z.abs().max()
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + step


def test_autocast_narrows_the_fused_path_only():
    info = INFOS["equal rows"]
    tensors = inputs(info, info, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert AtenSoftmax()(*tensors, info).dtype == torch.bfloat16
        output = EinsumSoftmax()(*tensors, info)
    assert output.dtype == torch.float32
    assert output.equal(EinsumSoftmax()(*tensors, info))


def test_masks_are_refused():
    info = INFOS["one document"]
    block = info.index // 3
    visibility = Visibility(block, block, torch.ones(*info.shape, KV_HEADS, dtype=torch.bool))
    with pytest.raises(ValueError, match="AtenSoftmax takes no visibility"):
        AtenSoftmax()(*inputs(info, info), info, visibility=visibility)
    with pytest.raises(ValueError, match="AtenSoftmax takes no visibility"):
        AtenSoftmax().block(*inputs(info, info), info, info, visibility=visibility)
    for op in (AtenSoftmax(causal=False), DenseVarlen(causal=False)):
        with pytest.raises(ValueError, match="a window of attention in both directions"):
            op(*inputs(info, info), info, window=4)


def test_tiles():
    (row,) = SequenceInfo.from_lengths([[4, 1, 3]]).fragments
    assert tiles(row, row, causal=True) == (
        Tile(0, 4, 0, 4, causal=True),
        Tile(4, 5, 4, 5),
        Tile(5, 8, 5, 8, causal=True),
    )
    assert tiles(row[:1], row[:1], causal=True, window=2) == (
        Tile(0, 2, 0, 2, causal=True),
        Tile(2, 3, 1, 2),
        Tile(2, 4, 2, 4, causal=True),
    )
    assert tiles(row[:1], row[:1], causal=True, window=3) == (
        Tile(0, 3, 0, 3, causal=True),
        Tile(3, 4, 1, 3),
        Tile(3, 4, 3, 4),
    )
    queries = (Fragment(6, 10, 10),)
    assert tiles(queries, (Fragment(12, 3, 3),), causal=True) == (
        Tile(0, 5, 0, 7),
        Tile(0, 5, 7, 12, causal=True),
        Tile(5, 6, 0, 12),
    )
    assert tiles(queries, (Fragment(10, 0, 0),), causal=True) == (Tile(0, 6, 0, 10),)
    assert tiles(queries, (Fragment(10, 16, 16),), causal=True) == ()
    assert tiles(queries, (Fragment(6, 10, 9),), causal=True) == ()  # another document


def test_tiles_without_the_causal_mask():
    """Order does not matter, so that neighbours of one document are one tile even behind a gap."""
    row = (Fragment(2, 0), Fragment(3, 9, 9), Fragment(1, 20), Fragment(2, 5, 5))
    assert tiles(row, row[:2], causal=False) == (Tile(0, 5, 0, 5), Tile(6, 8, 0, 5))
    assert tiles(row[1:2], row, causal=False) == (Tile(0, 3, 0, 5), Tile(0, 3, 6, 8))
    assert tiles(row, row[2:3], causal=False) == (Tile(5, 6, 0, 1),)


def test_whole_documents_are_one_call():
    def lengths_of(info: SequenceInfo, key_info: SequenceInfo, *, causal: bool):
        return whole_documents(info, key_info.fragments, torch.device("cpu"), causal=causal)

    info, apart = SequenceInfo.from_lengths([[4, 1, 3], [8]]), INFOS["scattered"]
    for causal in (True, False):
        lengths = lengths_of(info, info, causal=causal)
        assert lengths is not None
        assert lengths.bounds.tolist() == [0, 4, 5, 8, 16] and lengths.longest == 8
        assert lengths_of(apart, apart, causal=causal) is None
        assert lengths_of(*QUERIES_AND_KEYS["decoding"], causal=causal) is None
        before = lengths_of(*QUERIES_AND_KEYS["as many keys before"], causal=causal)
        assert (before is None) == causal
