"""The adapters to the flash kernels without a GPU: PyTorch's on the meta device, the package's over
a stand-in with its signatures. tests/gpu holds the kernels themselves to the definition."""

import sys
from types import ModuleType

import pytest
import torch

from models.ops.flash import AtenVarlenSoftmax, FlashSoftmax, Lengths
from models.ops.softmax import EinsumSoftmax
from tests.helpers import INFOS, assert_equal, outputs_and_gradients
from tests.models.ops.test_softmax import HEADS, V_DIM, DenseVarlen, inputs


@pytest.mark.parametrize("name", ["unequal rows", "scattered"])
def test_aten_takes_these_arguments(name):
    info = INFOS[name]
    q, k, v = (x.detach().to("meta") for x in inputs(info, info, dtype=torch.bfloat16))
    op = AtenVarlenSoftmax()
    for window in (None, 5):
        output, lse = op.block(q, k, v, info, info, window=window)
        assert output.shape == (*info.shape, HEADS, V_DIM) and output.dtype == torch.bfloat16
        assert lse.shape == (*info.shape, HEADS) and lse.dtype == torch.float32
        grads = op.block_backward(output, q, k, v, output, lse, info, info, window=window)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left, window_size_right, softcap, alibi_slopes,
):  # fmt: skip
    assert (dropout_p, window_size_right, softcap) == (0.0, -1, 0.0)
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    lengths = Lengths(cu_seqlens_q, max_seqlen_q), Lengths(cu_seqlens_k, max_seqlen_k)
    window = None if window_size_left == -1 else window_size_left + 1
    output, lse = DenseVarlen().varlen(q, k, v, *lengths, causal, softmax_scale, window)
    return output, lse, q.new_empty(0), None


def varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    lengths = Lengths(cu_seqlens_q, max_seqlen_q), Lengths(cu_seqlens_k, max_seqlen_k)
    window = None if window_size_left == -1 else window_size_left + 1
    saved = (dout, q, k, v, out, softmax_lse, *lengths, causal, softmax_scale, window)
    for into, grad in zip((dq, dk, dv), DenseVarlen().varlen_backward(*saved), strict=True):
        into.copy_(grad)
    return softmax_lse


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5)])
@pytest.mark.parametrize("name", INFOS)
def test_package(name, causal, window, monkeypatch):
    interface = ModuleType("flash_attn.flash_attn_interface")
    monkeypatch.setattr(interface, "_flash_attn_varlen_forward", varlen_forward, raising=False)
    monkeypatch.setattr(interface, "_flash_attn_varlen_backward", varlen_backward, raising=False)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    op, reference, info = FlashSoftmax(causal=causal), EinsumSoftmax(causal=causal), INFOS[name]
    monkeypatch.setattr(op, "check_dtype", lambda dtype: None)
    tensors = inputs(info, info)
    got, expected = (
        outputs_and_gradients(lambda *x, op=op: op(*x, info, window=window), tensors)
        for op in (op, reference)
    )
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("op", [AtenVarlenSoftmax(), FlashSoftmax()])
def test_wide_dtypes_are_refused(op):
    info = INFOS["one document"]
    with pytest.raises(ValueError, match="bf16 and fp16 only"):
        op(*inputs(info, info, dtype=torch.float32), info)
