"""Schemes of routed attention under test, layouts of whole chunks, and errors against one rank."""

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.ops.routed import RoutedAttention
from models.ops.routed_grid import chunk_grid
from models.ops.routed_softmax import DenseRoutedAttention, TiledRoutedAttention
from models.sequence import Fragment, SequenceInfo
from parallel.collectives import Axis
from parallel.layout import plan_layout
from parallel.routed import RoutedGather, RoutedRing, RoutedUlysses
from tests.parallel.layouts import Row, local, random_heads, rank_info, whole
from tests.parallel.softmax_schemes import worst

CHUNK, DIM, V_DIM = 4, 5, 3
HEADS = [(6, 3), (5, 5), (4, 2)]  # queries, keys
Build = Callable[[RoutedAttention, Axis], RoutedAttention]

SCHEMES: dict[str, Build] = {
    "ring": lambda op, axis: RoutedRing(op, axis=axis),
    "gather": lambda op, axis: RoutedGather(op, axis=axis),
    "ulysses": lambda op, axis: RoutedUlysses(op, axis=axis),
}


def dealt(lengths: list[int], ranks: int) -> tuple[Row, ...]:
    """Pieces of one to three chunks on any rank, in any order, and padding."""
    draw, pieces, index = random.Random(ranks), [], 0
    for length in lengths:
        position = 0
        while position < length:
            piece = min(draw.randint(1, 3) * CHUNK, length - position)
            pieces.append(Fragment(piece, index + position, position))
            position += piece
        index += length
    draw.shuffle(pieces)
    rows = [pieces[rank::ranks] for rank in range(ranks)]
    size = max(1, *(sum(f.length for f in row) for row in rows))
    for row in rows:
        missing = size - sum(f.length for f in row)
        if missing:
            row.append(Fragment(missing, index, padding=True))
            index += missing
    return tuple(map(tuple, rows))


def planned(lengths: list[int], ranks: int, strategy) -> tuple[Row, ...]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    documents = [Fragment(n, start) for n, start in zip(lengths, starts, strict=True)]
    return plan_layout(documents, ranks=ranks, strategy=strategy, multiple=CHUNK).ranks


def cases(ranks: int) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """Documents shorter than a chunk, as long and longer; over several ranks; ranks of padding."""
    documents = {
        "one": [ranks * 10],
        "edges": [1, CHUNK - 1, CHUNK, CHUNK + 1, 8 * ranks, 2 * CHUNK + 3],
        "three ranks": [2, 25],
        "padding": [CHUNK + 1],
    }
    for name, lengths in documents.items():
        for strategy in ("balanced", "zigzag", "contiguous"):
            yield f"{strategy} {name}", planned(lengths, ranks, strategy)
        yield f"dealt {name}", dealt(lengths, ranks)


def left_out(case: int, ranks: int) -> bool:
    """Three and four ranks have one half of the cases each, both with every document and layout."""
    return ranks > 2 and (case + case // 4 + ranks) % 2 == 1


def routing(info: SequenceInfo, kv_heads: int) -> Tensor:
    """[1, seq, kv_heads]: half of the chunks, at random; the second head keeps none, the third
    all."""
    grid = chunk_grid(info, CHUNK)
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(*grid.shape, kv_heads, generator=generator, dtype=torch.float64) < 0.5
    kept[:, :, 1:2], kept[:, :, 2:3] = False, True
    return grid.spread(kept.double())


def inputs(
    peers: tuple[Row, ...], heads: tuple[int, int], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, keep and a weight of the output."""
    q_heads, kv_heads = heads
    shapes = [(q_heads, DIM), (kv_heads, DIM), (kv_heads, V_DIM), (q_heads, V_DIM)]
    q, k, v, weight = (x.detach().to(dtype).requires_grad_() for x in random_heads(peers, shapes))
    return [q, k, v, routing(whole(peers), kv_heads).requires_grad_(), weight]


def attend(
    op: RoutedAttention, tensors: list[Tensor], info: SequenceInfo, *, shared: bool = False
) -> list[Tensor]:
    """Output and the gradients of q, k, v and keep, of the latter the sum over a chunk; shared:
    without v, the keys being the values, too."""
    q, k, v, keep, weight = tensors
    output = op(q, k, None if shared else v, keep, info)
    leaves = [q, k, keep] if shared else [q, k, v, keep]
    loss = (output[..., : weight.shape[-1]] * weight).sum()  # latents are wider than values
    *grads, gate = torch.autograd.grad(loss, leaves)
    grid = chunk_grid(info, CHUNK)
    return [output.detach(), *grads, grid.spread(grid.cut(gate).sum(2))]


def error(
    build: Build,
    peers: tuple[Row, ...],
    heads: tuple[int, int],
    axis: Axis,
    shared: bool = False,
    **keywords: bool,
) -> float:
    """On this rank, of everything, against the definition on the whole sequence."""
    tensors, info = inputs(peers, heads), rank_info(peers, axis.rank)
    dense = DenseRoutedAttention(chunk=CHUNK, **keywords)
    expected = attend(dense, tensors, whole(peers), shared=shared)
    scheme = build(TiledRoutedAttention(chunk=CHUNK, **keywords), axis)
    got = attend(scheme, [local(x, info) for x in tensors], info, shared=shared)
    return worst(got, expected, info)
