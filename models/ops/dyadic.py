"""Decayed scores inside a chunk, exact for any decay: dyadic anchoring.

    qk[i, j] = sum_d q[i, d] k[j, d] exp(G[i, d] - G[j, d]),  i > j,

with G the running sum of log-decays.

Factored as (q exp(G)) (k exp(-G)) this overflows: a 64-token chunk may decay by hundreds of nats.
So blocks of 2, 4, ..., C tokens score their right half against their left half, with the last
token of the left half as anchor. Each pair i > j meets in exactly one block, both factors decay
towards the anchor, so no exponent is positive, and all work is batched matrix products.

The decays from and to the anchors are built by multiplying those of the half blocks. No running
sum is ever subtracted, so weak decays next to strong ones keep their precision.

Shapes: X chunks of all rows and heads, C tokens a chunk (a power of two), K key channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Level(NamedTuple):
    """Blocks of two halves, [X, blocks, half, K]; rows are those of q, then those of k."""

    from_anchor: Tensor  # decay from the anchor to each right-half token, itself included
    to_anchor: Tensor  # decay after each left-half token, up to the anchor
    rows: Tensor  # [X, blocks, 2 half, K], right half, decayed from the anchor
    keys: Tensor  # left half of k, decayed to the anchor


class DyadicScores:
    """scores: those of q and of k against k, [X, 2, C, C], strictly lower; zero elsewhere.

    prefix: the decay from the chunk's start to each token, itself included; suffix: the decay
    after each token, up to the chunk's end; both [X, C, K].
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor) -> None:
        chunks, size, _ = q.shape
        self.queries_keys = torch.stack((q, k), dim=1)
        self.scores: Tensor = q.new_zeros(chunks, 2, size, size)
        self.prefix, self.suffix = log_decay.exp(), torch.ones_like(q)
        self.levels: list[_Level] = []
        half = 1
        while half < size:
            self._score(half)
            half *= 2

    def _score(self, half: int) -> None:
        prefix, suffix = _halves(self.prefix, half), _halves(self.suffix, half)
        # Copies: prefix and suffix change below, and a single chunk's halves are contiguous as is.
        packed = torch.contiguous_format
        from_anchor = prefix[:, :, 1].clone(memory_format=packed)
        to_anchor = suffix[:, :, 0].clone(memory_format=packed)
        pairs = _halves(self.queries_keys, half)  # [X, 2, blocks, 2, half, K]
        rows = pairs.new_empty(*from_anchor.shape[:2], 2, *from_anchor.shape[2:])
        torch.mul(pairs[:, :, :, 1].transpose(1, 2), from_anchor.unsqueeze(2), out=rows)
        level = _Level(from_anchor, to_anchor, rows.flatten(2, 3), pairs[:, 1, :, 0] * to_anchor)
        scores = level.rows @ level.keys.mT
        _squares(self.scores, half).copy_(scores.unflatten(2, (2, half)))
        prefix[:, :, 1] *= prefix[:, :, 0, -1:]
        suffix[:, :, 0] *= from_anchor[:, :, -1:]
        self.levels.append(level)

    def backward(
        self, grad_scores: Tensor, grad_log_prefix: Tensor, grad_log_suffix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and log_decay.

        The gradients of the decays come, and are carried, as those of their logarithms: of
        x d, with d a decay, that is x d times the gradient of x d. The two are overwritten.
        """
        grad = torch.zeros_like(self.queries_keys)
        half = grad_log_prefix.shape[1]
        for level in reversed(self.levels):
            half //= 2
            left, right = _halves(grad_log_prefix, half).unbind(2)
            to_left = _halves(grad_log_suffix, half)[:, :, 0]
            whole_left, whole_right = right.sum(2), to_left.sum(2)  # adjoint of the merge
            left[:, :, -1] += whole_left
            right[:, :, -1] += whole_right

            squares = _squares(grad_scores, half).flatten(2, 3)  # [X, blocks, 2 half, half]
            rows = squares @ level.keys
            columns = squares.mT @ level.rows
            of_pairs = _halves(grad, half)
            by_kind = rows.unflatten(2, (2, half))
            of_pairs[:, :, :, 1].addcmul_(by_kind.transpose(1, 2), level.from_anchor.unsqueeze(1))
            of_pairs[:, 1, :, 0].addcmul_(columns, level.to_anchor)
            rows *= level.rows
            right += by_kind[:, :, 0]
            right += by_kind[:, :, 1]
            to_left.addcmul_(columns, level.keys)
        return grad[:, 0], grad[:, 1], grad_log_prefix


def _halves(x: Tensor, half: int) -> Tensor:
    """[..., C, K] as [..., blocks, 2, half, K], a view."""
    return x.unflatten(-2, (-1, 2, half))


def _squares(scores: Tensor, half: int) -> Tensor:
    """[X, 2, C, C] -> lower left squares of the diagonal blocks, [X, blocks, 2, half, half]."""
    blocks = scores.unflatten(3, (-1, 2 * half)).unflatten(2, (-1, 2 * half))
    return blocks.diagonal(dim1=2, dim2=4).movedim(-1, 1)[..., half:, :half]
