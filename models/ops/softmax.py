"""Softmax attention inside packed documents.

`EinsumSoftmax` is the definition. The fused implementations see no mask: a kernel is called for
each of the `tiles` of what is seen, without a mask or with the plain causal one. FlashAttention-2,
arXiv 2307.08691, for the kernels and for merging partial results by their log-sum-exp.
"""

import math
from abc import abstractmethod
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.runs import grouped_rows
from models.ops.tiles import Tile, tiles
from models.precision import autocast, full_precision, widen
from models.sequence import SequenceInfo, SoftmaxAttention, Visibility


class EinsumSoftmax(SoftmaxAttention):
    """The definition, with a score matrix per head, in fp32 or wider and in any mask."""

    masks = frozenset({"window", "visibility"})

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        info: SequenceInfo,
        *,
        key_info: SequenceInfo | None = None,
        **kwargs,
    ) -> Tensor:
        return self.block(q, k, v, info, key_info or info, **kwargs)[0]

    def block(self, q, k, v, info, key_info, **kwargs) -> tuple[Tensor, Tensor]:
        with full_precision(q):
            scores = _scores(q, k, info, key_info, causal=self.causal, **kwargs)
            top = scores.detach().amax(-1, keepdim=True)
            # A row without keys: exp(-inf - 0) is 0 with gradient 0, exp(-inf + inf) would be NaN.
            top = top.masked_fill(top == -math.inf, 0)
            weights = (scores - top).exp()
            total = weights.sum(-1, keepdim=True)
            lse = (total.log() + top).squeeze(-1)  # [B, kv heads, group, S]
            mean = weights / total.masked_fill(total == 0, 1)
            output = torch.einsum("bhgqk,bkhd->bqhgd", mean, widen(v)).flatten(2, 3)
        return output.to(q.dtype), lse.flatten(1, 2).transpose(1, 2)

    def block_backward(self, grad_output, q, k, v, output, lse, info, key_info, **kwargs):
        kv_heads, scale = k.shape[2], kwargs.get("scale") or q.shape[-1] ** -0.5
        with full_precision(q):
            scores = _scores(q, k, info, key_info, causal=self.causal, **kwargs)
            grad = widen(grad_output)
            lse = widen(lse).masked_fill(lse == -math.inf, 0).transpose(1, 2)
            weights = (scores - lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1)).exp()
            delta = (grad * widen(output)).sum(-1).transpose(1, 2).unflatten(1, (kv_heads, -1))
            grad = grad.unflatten(2, (kv_heads, -1))
            grad_v = torch.einsum("bhgqk,bqhgd->bkhd", weights, grad)
            grad_weights = torch.einsum("bqhgd,bkhd->bhgqk", grad, widen(v))
            grad_scores = weights * (grad_weights - delta.unsqueeze(-1)) * scale
            grad_q = torch.einsum("bhgqk,bkhd->bqhgd", grad_scores, widen(k)).flatten(2, 3)
            queries = widen(q).unflatten(2, (kv_heads, -1))
            grad_k = torch.einsum("bhgqk,bqhgd->bkhd", grad_scores, queries)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _scores(
    q: Tensor,
    k: Tensor,
    info: SequenceInfo,
    key_info: SequenceInfo,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    visibility: Visibility | None = None,
) -> Tensor:
    """[batch, kv_heads, group, seq, key_seq], -inf where a query does not see a key."""
    queries = widen(q).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, widen(k))
    index, key_index = info.index.unsqueeze(-1), key_info.index.unsqueeze(-2)
    document = (info.index - info.positions).unsqueeze(-1)
    key_document = (key_info.index - key_info.positions).unsqueeze(-2)
    seen = document == key_document  # [B, S, key S]
    if causal:
        seen &= key_index <= index
    if window is not None:
        seen &= (index - key_index).abs() < window
    seen = seen[:, None, None]
    if visibility is not None:
        own = visibility.query_block.unsqueeze(-1) == visibility.key_block.unsqueeze(-2)
        seen = seen & (own[:, None] | visibility.keep.mT.unsqueeze(-2)).unsqueeze(2)
    return (scores * (scale or q.shape[-1] ** -0.5)).masked_fill(~seen, -math.inf)


class BlockSoftmax(SoftmaxAttention):
    """Differentiable attention for whoever has `block` and `block_backward`."""

    # The plans of an implementation change with every batch: nothing for a compiler to keep.
    @torch.compiler.disable
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        info: SequenceInfo,
        *,
        key_info: SequenceInfo | None = None,
        scale: float | None = None,
        **masks,
    ) -> Tensor:
        q, k, v = autocast(q, k, v)
        options = {"scale": scale, **masks}
        return _Attention.apply(self, q, k, v, info, key_info or info, options)

    def refuse(self, masks: dict[str, object]) -> None:
        """Raises ValueError for a mask that is not None."""
        for name, mask in masks.items():
            if mask is not None:
                raise ValueError(
                    f"{type(self).__name__} takes no {name}; ops.softmax=reference does"
                )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, q, k, v, info, key_info, options):
        output, lse = op.block(q, k, v, info, key_info, **options)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.op, ctx.infos, ctx.options = op, (info, key_info), options
        return output

    @staticmethod
    def backward(ctx, grad):
        grads = ctx.op.block_backward(grad, *ctx.saved_tensors, *ctx.infos, **ctx.options)
        return None, *grads, None, None, None


def merge_(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds keys to attention in place: (output, lse) over some, (part, part_lse) over others.

    output: [..., heads, v_dim]; lse: [..., heads], -inf where no key was seen. output keeps its
    dtype, so an accumulator should be fp32 or wider.
    """
    total = torch.logaddexp(lse, part_lse)
    finite = total.masked_fill(total == -math.inf, 0)
    output.mul_((lse - finite).exp().unsqueeze(-1))
    output.add_(part * (part_lse - finite).exp().unsqueeze(-1))
    lse.copy_(total)


class TiledSoftmax(BlockSoftmax):
    """A kernel that knows only "all keys" and "causal square", applied tile by tile.

    It takes a window where it is causal.
    """

    masks = frozenset({"window"})
    head_multiple = 1  # the kernel takes head dims that are multiples of this

    @abstractmethod
    def tile(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output, and lse [batch, seq, heads], of dense attention with equal head dims."""

    @abstractmethod
    def tile_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) under the given output and lse."""

    def block(
        self, q, k, v, info, key_info, *, scale=None, window=None, **masks
    ) -> tuple[Tensor, Tensor]:
        self.refuse(masks)
        v_dim, scale = v.shape[-1], scale or q.shape[-1] ** -0.5
        q, k, v = self._equal_dims(q, k, v)
        plans = self._plans(info, key_info, window)
        merges = any(a.q_stop > b.q_start for plan in plans for a, b in pairwise(plan))
        output = (widen(q[:0]) if merges else q).new_zeros(q.shape)
        lse = widen(q[:0]).new_full(q.shape[:-1], -math.inf)
        for rows, plan in grouped_rows(plans):
            for tile in plan:
                at, key_at = _at(rows, tile)
                queries, keys, values = _turned(tile, q[at], k[key_at], v[key_at])
                results = self.tile(queries, keys, values, tile.causal, scale)
                part, part_lse = _turned(tile, *results)
                if merges:
                    merge_(output[at], lse[at], part, part_lse)
                else:
                    output[at], lse[at] = part, part_lse
        return output[..., :v_dim].to(q.dtype), lse

    def block_backward(
        self,
        grad_output,
        q,
        k,
        v,
        output,
        lse,
        info,
        key_info,
        *,
        scale=None,
        window=None,
        **masks,
    ):
        self.refuse(masks)
        dims, scale = (q.shape[-1], k.shape[-1], v.shape[-1]), scale or q.shape[-1] ** -0.5
        q, k, v, grad, output = self._equal_dims(q, k, v, grad_output, output)
        plans = self._plans(info, key_info, window)
        grads = [widen(x[:0]).new_zeros(x.shape) for x in (q, k, v)]
        for rows, plan in grouped_rows(plans):
            for tile in plan:
                at, key_at = _at(rows, tile)
                seen = grad[at], q[at], k[key_at], v[key_at], output[at], lse[at]
                parts = self.tile_backward(*_turned(tile, *seen), tile.causal, scale)
                parts = _turned(tile, *parts)
                for total, where, part in zip(grads, (at, key_at, key_at), parts, strict=True):
                    total[where] += part
        return tuple(x[..., :dim].to(q.dtype) for x, dim in zip(grads, dims, strict=True))

    def _plans(
        self, info: SequenceInfo, key_info: SequenceInfo, window: int | None
    ) -> list[tuple[Tile, ...]]:
        rows = zip(info.fragments, key_info.fragments, strict=True)
        return [tiles(row, key_row, causal=self.causal, window=window) for row, key_row in rows]

    def _equal_dims(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Zero-padded to one head dim: zeros change neither scores nor the rest of the output."""
        widest = max(x.shape[-1] for x in tensors)
        dim = -(-widest // self.head_multiple) * self.head_multiple
        missing = [dim - x.shape[-1] for x in tensors]
        return tuple(F.pad(x, (0, n)) if n else x for x, n in zip(tensors, missing, strict=True))


def _turned(tile: Tile, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[batch, seq, ...] each, in the order that the tile is computed in, or back from it."""
    return tuple(x.flip(1) for x in tensors) if tile.reverse else tensors


def _at(rows: slice, tile: Tile) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    return (rows, slice(tile.q_start, tile.q_stop)), (rows, slice(tile.k_start, tile.k_stop))


class AtenSoftmax(TiledSoftmax):
    """PyTorch's fused attention for CPUs; fp64 too."""

    # A row that sees no key would get lse 0 here instead of -inf, and the causal mask is aligned
    # to the top left; tiles hold neither empty rows nor causal rectangles.

    def tile(self, q, k, v, causal, scale):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale
        )
        return output.transpose(1, 2), lse.transpose(1, 2)

    def tile_backward(self, grad, q, k, v, output, lse, causal, scale):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (grad, q, k, v, output, lse)), 0.0, causal, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in grads)
