"""FlashAttention-2 (arXiv 2307.08691) on CUDA, PyTorch's own build of it and the package.

Both take variable lengths, so the packed documents of a whole batch are one call.
"""

from abc import abstractmethod
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.softmax import TiledSoftmax
from models.ops.tiles import tiles
from models.sequence import Fragment, SequenceInfo, per_layout


class Lengths(NamedTuple):
    """Where sequences of a flattened batch start and end, and how long the longest is."""

    bounds: Tensor  # [sequences + 1] int32
    longest: int


class VarlenSoftmax(TiledSoftmax):
    """A kernel over sequences of unequal lengths in one flat row of tokens.

    Whole documents beside each other are one call. Anything else goes tile by tile, a batch of
    equal lengths each. fp16 and bf16 only: raises ValueError for a wider dtype.
    """

    head_multiple = 8

    @abstractmethod
    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Lengths,
        key_lengths: Lengths,
        causal: bool,
        scale: float,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output [tokens, heads, dim], and lse [heads, tokens] in fp32. A window is causal."""

    @abstractmethod
    def varlen_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        lengths: Lengths,
        key_lengths: Lengths,
        causal: bool,
        scale: float,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) under the given output and lse."""

    def block(self, q, k, v, info, key_info, *, scale=None, window=None, **masks):
        whole = self._whole(info, key_info, q.device, window)
        if whole is None:
            return super().block(q, k, v, info, key_info, scale=scale, window=window, **masks)
        self.refuse(masks)
        v_dim, scale = v.shape[-1], scale or q.shape[-1] ** -0.5
        padded = self._equal_dims(q, k, v)
        output, lse = self._forward(*padded, whole, whole, self.causal, scale, window)
        return output[..., :v_dim], lse

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
        whole = self._whole(info, key_info, q.device, window)
        if whole is None:
            saved = (grad_output, q, k, v, output, lse)
            options = {"scale": scale, "window": window, **masks}
            return super().block_backward(*saved, info, key_info, **options)
        self.refuse(masks)
        dims, scale = (q.shape[-1], k.shape[-1], v.shape[-1]), scale or q.shape[-1] ** -0.5
        q, k, v, grad, output = self._equal_dims(q, k, v, grad_output, output)
        saved = (grad, q, k, v, output, lse)
        grads = self._backward(*saved, whole, whole, self.causal, scale, window)
        return tuple(x[..., :dim] for x, dim in zip(grads, dims, strict=True))

    def _whole(
        self, info: SequenceInfo, key_info: SequenceInfo, device: torch.device, window: int | None
    ) -> Lengths | None:
        """What one call of the kernel takes; None: tile by tile, where `tiles` may refuse it."""
        if window is not None and not self.causal:
            return None
        return whole_documents(info, key_info.fragments, device, causal=self.causal)

    def tile(self, q, k, v, causal, scale):
        return self._forward(q, k, v, _equal_lengths(q), _equal_lengths(k), causal, scale)

    def tile_backward(self, grad, q, k, v, output, lse, causal, scale):
        lengths = _equal_lengths(q), _equal_lengths(k)
        return self._backward(grad, q, k, v, output, lse, *lengths, causal, scale)

    def _forward(self, q, k, v, lengths, key_lengths, causal, scale, window=None):
        self.check_dtype(q.dtype)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        output, lse = self.varlen(*flat, lengths, key_lengths, causal, scale, window)
        return output.view(q.shape), lse.T.reshape(q.shape[:-1])

    def _backward(
        self, grad, q, k, v, output, lse, lengths, key_lengths, causal, scale, window=None
    ):
        flat = (x.flatten(0, 1).contiguous() for x in (grad, q, k, v, output))
        flat_lse = lse.flatten(0, 1).T.contiguous()
        saved = (*flat, flat_lse)
        grads = self.varlen_backward(*saved, lengths, key_lengths, causal, scale, window)
        return tuple(x.view_as(y) for x, y in zip(grads, (q, k, v), strict=True))

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{type(self).__name__} got {dtype}: flash kernels take bf16 and fp16 only; "
                "use trainer.precision=bf16 or ops.softmax=reference"
            )


def _equal_lengths(x: Tensor) -> Lengths:
    """Each row of [batch, seq, ...] a sequence."""
    batch, seq = x.shape[:2]
    bounds = torch.arange(0, batch * seq + 1, seq, dtype=torch.int32, device=x.device)
    return Lengths(bounds, seq)


@per_layout
def whole_documents(
    info: SequenceInfo,
    key_rows: tuple[tuple[Fragment, ...], ...],
    device: torch.device,
    *,
    causal: bool,
) -> Lengths | None:
    """The sequences of the flattened batch if every token sees just its own one, or if `causal`
    just what comes before it there; None if there is more to it."""
    stops = [0]
    for row, key_row in zip(info.fragments, key_rows, strict=True):
        plan, seq = tiles(row, key_row, causal=causal), sum(fragment.length for fragment in row)
        ends = [0, *(tile.q_stop for tile in plan)]
        squares = [(start, stop, start, stop) for start, stop in pairwise(ends)]
        if [tile[:4] for tile in plan] != squares or ends[-1] != seq:
            return None
        # Keys that all come before as many queries make a square too; a single pair is in order.
        if not all(tile.causal == causal or tile.q_stop - tile.q_start == 1 for tile in plan):
            return None
        if seq != sum(fragment.length for fragment in key_row):
            return None
        stops += [stops[-1] + stop for stop in ends[1:]]
    longest = max(stop - start for start, stop in pairwise(stops))
    return Lengths(torch.tensor(stops, dtype=torch.int32, device=device), longest)


class AtenVarlenSoftmax(VarlenSoftmax):
    """The flash kernels that PyTorch ships for CUDA."""

    def varlen(self, q, k, v, lengths, key_lengths, causal, scale, window=None):
        kernel = torch.ops.aten._flash_attention_forward
        bounds = (lengths.bounds, key_lengths.bounds, lengths.longest, key_lengths.longest)
        back = None if window is None else window - 1
        output, lse, *_ = kernel(
            q, k, v, *bounds, 0.0, causal, False, scale=scale, window_size_left=back
        )
        return output, lse

    def varlen_backward(
        self, grad, q, k, v, output, lse, lengths, key_lengths, causal, scale, window=None
    ):
        kernel = torch.ops.aten._flash_attention_backward
        bounds = (lengths.bounds, key_lengths.bounds, lengths.longest, key_lengths.longest)
        # State of the dropout's random numbers, of which there are none.
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        saved = (grad, q, k, v, output, lse)
        back = None if window is None else window - 1
        return kernel(*saved, *bounds, 0.0, causal, *seed, scale=scale, window_size_left=back)


class FlashSoftmax(VarlenSoftmax):
    """The flash-attn package."""

    def varlen(self, q, k, v, lengths, key_lengths, causal, scale, window=None):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        output, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, **_package_arguments(lengths, key_lengths, causal, scale, window)
        )
        return output, lse

    def varlen_backward(
        self, grad, q, k, v, output, lse, lengths, key_lengths, causal, scale, window=None
    ):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        dq, dk, dv = grads
        _flash_attn_varlen_backward(
            grad,
            q,
            k,
            v,
            output,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_package_arguments(lengths, key_lengths, causal, scale, window),
        )
        return grads


def _package_arguments(
    lengths: Lengths, key_lengths: Lengths, causal: bool, scale: float, window: int | None
) -> dict[str, object]:
    return {
        "cu_seqlens_q": lengths.bounds,
        "cu_seqlens_k": key_lengths.bounds,
        "max_seqlen_q": lengths.longest,
        "max_seqlen_k": key_lengths.longest,
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
