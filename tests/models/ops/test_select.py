"""Choosing implementations by name."""

import pytest
import torch

from models.ops import select
from models.ops.conv import FragmentConv, ShiftedConv
from models.ops.decayed_sum import ChunkedDecayedSum, TokenLoopDecayedSum
from models.ops.delta_rule import ChunkedDeltaRule, TokenLoopDeltaRule
from models.ops.experts import GroupedExperts, GroupedMatmulExperts, LoopExperts
from models.ops.flash import AtenVarlenSoftmax, FlashSoftmax
from models.ops.latent import MaterialisedLatent
from models.ops.select import Ops
from models.ops.softmax import AtenSoftmax, EinsumSoftmax

ROUTED = "routed_attention=tiled routed_delta_rule=chunked"


@pytest.fixture(params=[False, True], ids=["bare", "with packages"])
def packages(request, monkeypatch) -> bool:
    """Whether the optional packages seem to be installed."""
    monkeypatch.setattr(select, "find_spec", lambda name: name if request.param else None)
    return request.param


def test_auto_on_cpu(packages):
    ops = Ops()
    line = "softmax=aten delta_rule=chunked decayed_sum=chunked conv=fused experts=grouped"
    assert ops.describe() == f"{line} {ROUTED}"
    assert type(ops.softmax()) is AtenSoftmax
    assert type(ops.delta_rule()) is ChunkedDeltaRule
    assert type(ops.decayed_sum()) is ChunkedDecayedSum
    assert type(ops.conv()) is FragmentConv
    assert type(ops.experts()) is GroupedExperts
    latent = ops.latent()
    assert type(latent) is MaterialisedLatent and type(latent.softmax) is AtenSoftmax
    assert ops.softmax() is not ops.softmax()
    assert ops.softmax().causal and latent.softmax.causal
    assert not ops.softmax(causal=False).causal and not ops.latent(causal=False).softmax.causal


def test_auto_on_cuda(packages):
    ops = Ops(device="cuda")
    line = "softmax=flash delta_rule=fla decayed_sum=fla conv=fla experts=grouped"
    bare = "softmax=aten delta_rule=chunked decayed_sum=chunked conv=fused experts=grouped"
    assert ops.describe() == f"{line if packages else bare} {ROUTED}"
    assert type(ops.softmax()) is (FlashSoftmax if packages else AtenVarlenSoftmax)
    assert type(ops.experts()) is GroupedMatmulExperts


def test_auto_takes_no_kernel_that_would_narrow(packages):
    wide = "softmax=reference delta_rule=chunked decayed_sum=chunked"
    conv = "fla" if packages else "fused"
    ops = Ops(device="cuda", dtype=torch.float32)
    assert ops.describe() == f"{wide} conv={conv} experts=grouped {ROUTED}"
    ops = Ops(device="cuda", dtype=torch.float64)
    assert ops.describe() == f"{wide} conv=fused experts=reference {ROUTED}"
    assert Ops(device="cuda", dtype=torch.bfloat16).describe() == Ops(device="cuda").describe()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert Ops(dtype=dtype).describe() == Ops().describe()


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "meta"])
def test_reference_runs_everywhere(device):
    name = "reference"
    names = ("softmax", "delta_rule", "decayed_sum", "conv", "experts")
    ops = Ops(**dict.fromkeys(names, name), device=device)
    assert [type(getattr(ops, op)()) for op in names] == [
        EinsumSoftmax,
        TokenLoopDeltaRule,
        TokenLoopDecayedSum,
        ShiftedConv,
        LoopExperts,
    ]


def test_an_explicit_name_never_falls_back(monkeypatch):
    monkeypatch.setattr(select, "find_spec", lambda name: None)
    cases = {
        "ops.softmax=flash needs the package flash-attn, which is not installed; "
        "allowed here: auto, aten, reference": {"softmax": "flash", "device": "cuda"},
        "ops.delta_rule=fla runs on cuda and the device is cpu; "
        "allowed here: auto, chunked, reference": {"delta_rule": "fla"},
        "ops.softmax=aten does not compute in torch.float32; allowed here: auto, reference": {
            "softmax": "aten",
            "device": "cuda",
            "dtype": torch.float32,
        },
        "ops.conv=fast does not exist; allowed here: auto, fused, reference": {"conv": "fast"},
    }
    for message, keywords in cases.items():
        with pytest.raises(ValueError) as error:
            Ops(**keywords)
        assert str(error.value) == message
