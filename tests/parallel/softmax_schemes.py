"""Softmax schemes under test, their inputs, and their error against one rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.ops.softmax import EinsumSoftmax
from models.sequence import SequenceInfo, SoftmaxAttention
from parallel.collectives import Axis
from parallel.gather import GatherAttention
from parallel.ring import RingAttention
from parallel.ulysses import UlyssesAttention
from tests.parallel.layouts import Row, local, random_heads, rank_info, whole

DIM, V_DIM = 5, 3
HEADS = [(6, 2), (9, 3), (5, 5), (4, 1)]  # queries, keys
Build = Callable[[SoftmaxAttention, Axis], SoftmaxAttention]

SCHEMES: dict[str, Build] = {
    "ring": lambda op, axis: RingAttention(op, axis=axis),
    "gather": lambda op, axis: GatherAttention(op, axis=axis, head_groups=2),
    "ulysses": lambda op, axis: UlyssesAttention(op, axis=axis),
}


def inputs(
    peers: tuple[Row, ...],
    heads: tuple[int, int],
    *,
    dims: tuple[int, int] = (DIM, V_DIM),
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v and a weight of the output; scores differ in size from head to head."""
    (dim, v_dim), (q_heads, kv_heads) = dims, heads
    shapes = [(q_heads, dim), (kv_heads, dim), (kv_heads, v_dim), (q_heads, v_dim)]
    q, *others = random_heads(peers, shapes)
    q.data *= torch.logspace(-1, 1, q_heads, dtype=q.dtype).unsqueeze(-1)
    return [x.detach().to(dtype).requires_grad_() for x in (q, *others)]


def attend(
    op: SoftmaxAttention, tensors: list[Tensor], info: SequenceInfo, *, window: int | None = None
) -> list[Tensor]:
    """Output and the gradients of q, k, v."""
    *qkv, weight = tensors
    output = op(*qkv, info, window=window)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), qkv)]


def worst(got: list[Tensor], expected: list[Tensor], info: SequenceInfo) -> float:
    """Largest difference of this rank's tokens, relative to the largest entry on any rank."""
    pairs = zip(got, expected, strict=True)
    errors = [(x - y[:, info.index[0]]).abs().amax() / y.abs().amax() for x, y in pairs]
    return max(error.item() for error in errors)


def errors(
    ops: list[SoftmaxAttention],
    peers: tuple[Row, ...],
    heads,
    rank: int,
    *,
    causal: bool = True,
    window: int | None = None,
) -> list[float]:
    """Of each op on this rank, against the definition on the whole sequence."""
    tensors, info = inputs(peers, heads), rank_info(peers, rank)
    expected = attend(EinsumSoftmax(causal=causal), tensors, whole(peers), window=window)
    return [
        worst(attend(op, [local(x, info) for x in tensors], info, window=window), expected, info)
        for op in ops
    ]
