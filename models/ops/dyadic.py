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
    """Blocks of two halves: [X, blocks, half, K] each."""

    from_anchor: Tensor  # decay from the anchor to each right-half token, itself included
    to_anchor: Tensor  # decay after each left-half token, up to the anchor
    q: Tensor  # right half, decayed from the anchor
    k: Tensor  # right half, decayed from the anchor
    keys: Tensor  # left half, decayed to the anchor


class DyadicScores:
    """Scores of q and of k against k, [X, C, C], strictly lower; zero elsewhere.

    prefix: the decay from the chunk's start to each token, itself included; suffix: the decay
    after each token, up to the chunk's end; both [X, C, K].
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor) -> None:
        chunks, size, _ = q.shape
        self.inputs = (q, k)
        self.qk, self.kk = q.new_zeros(2, chunks, size, size)
        self.prefix, self.suffix = log_decay.exp(), torch.ones_like(q)
        self.levels: list[_Level] = []
        half = 1
        while half < size:
            self._score(half)
            half *= 2

    def _score(self, half: int) -> None:
        q, k = (_halves(x, half) for x in self.inputs)
        prefix, suffix = _halves(self.prefix, half), _halves(self.suffix, half)
        from_anchor, to_anchor = prefix[:, :, 1].contiguous(), suffix[:, :, 0].contiguous()
        level = _Level(
            from_anchor,
            to_anchor,
            q[:, :, 1] * from_anchor,
            k[:, :, 1] * from_anchor,
            k[:, :, 0] * to_anchor,
        )
        _squares(self.qk, half).copy_(level.q @ level.keys.mT)
        _squares(self.kk, half).copy_(level.k @ level.keys.mT)
        prefix[:, :, 1] *= prefix[:, :, 0, -1:]
        suffix[:, :, 0] *= from_anchor[:, :, -1:]
        self.levels.append(level)

    def backward(
        self, grad_qk: Tensor, grad_kk: Tensor, grad_log_prefix: Tensor, grad_log_suffix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and log_decay.

        The gradients of the decays come, and are carried, as those of their logarithms: of
        x d, with d a decay, that is x d times the gradient of x d. The two are overwritten.
        """
        grad_q, grad_k = torch.zeros_like(grad_log_prefix), torch.zeros_like(grad_log_prefix)
        half = grad_q.shape[1]
        for level in reversed(self.levels):
            half //= 2
            left, right = _halves(grad_log_prefix, half).unbind(2)
            to_left = _halves(grad_log_suffix, half)[:, :, 0]
            whole_left, whole_right = right.sum(2), to_left.sum(2)  # adjoint of the merge
            left[:, :, -1] += whole_left
            right[:, :, -1] += whole_right

            square_qk, square_kk = _squares(grad_qk, half), _squares(grad_kk, half)
            rows_q, rows_k = square_qk @ level.keys, square_kk @ level.keys
            columns = square_qk.mT @ level.q + square_kk.mT @ level.k
            right.addcmul_(rows_q, level.q).addcmul_(rows_k, level.k)
            to_left.addcmul_(columns, level.keys)
            _halves(grad_q, half)[:, :, 1].addcmul_(rows_q, level.from_anchor)
            into_k = _halves(grad_k, half)
            into_k[:, :, 1].addcmul_(rows_k, level.from_anchor)
            into_k[:, :, 0].addcmul_(columns, level.to_anchor)
        return grad_q, grad_k, grad_log_prefix


def _halves(x: Tensor, half: int) -> Tensor:
    """[X, C, K] as [X, blocks, 2, half, K], a view."""
    return x.unflatten(1, (-1, 2, half))


def _squares(scores: Tensor, half: int) -> Tensor:
    """[X, C, C] -> lower left squares of the diagonal blocks, [X, blocks, half, half], a view."""
    blocks = scores.unflatten(2, (-1, 2 * half)).unflatten(1, (-1, 2 * half))
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)[:, :, half:, :half]
