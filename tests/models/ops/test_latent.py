"""Latent attention: both forms against keys and values written out."""

from functools import partial

import pytest
import torch

from models.ops.latent import MaterialisedLatent, absorbs
from models.ops.softmax import AtenSoftmax, EinsumSoftmax
from models.sequence import SequenceInfo
from tests.helpers import INFOS, assert_equal, outputs_and_gradients, random_tensors

HEADS, NOPE, ROPE, V_DIM, RANK = 3, 6, 2, 5, 7
CASES = {name: (info, info) for name, info in INFOS.items()} | {
    "decoding": (SequenceInfo.span(2, 20, 21), SequenceInfo.span(2, 0, 21)),
    "chunked prefill": (SequenceInfo.span(2, 8, 21), SequenceInfo.span(2, 0, 21)),
}


def inputs(info: SequenceInfo, key_info: SequenceInfo):
    (batch, seq), key_seq = info.shape, key_info.shape[1]
    return random_tensors(
        (batch, seq, HEADS, NOPE + ROPE),
        (batch, key_seq, RANK),
        (batch, key_seq, ROPE),
        (HEADS, NOPE + V_DIM, RANK),
    )


def written_out(q, latent, shared_key, up_weight, info, key_info, scale, causal):
    k = torch.stack([latent @ w[:NOPE].T for w in up_weight], dim=2)
    k = torch.cat([k, torch.stack([shared_key] * HEADS, dim=2)], dim=-1)
    v = torch.stack([latent @ w[NOPE:].T for w in up_weight], dim=2)
    return EinsumSoftmax(causal=causal)(q, k, v, info, key_info=key_info, scale=scale)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_both_forms(name, absorbed, monkeypatch):
    monkeypatch.setattr("models.ops.latent.absorbs", lambda *sizes: absorbed)
    info, key_info = CASES[name]
    tensors = inputs(info, key_info)
    for given, used, causal in ((None, (NOPE + ROPE) ** -0.5, True), (0.3, 0.3, False)):
        op = MaterialisedLatent(AtenSoftmax(causal=causal))
        got = outputs_and_gradients(partial(op, info=info, key_info=key_info, scale=given), tensors)
        expected = outputs_and_gradients(
            partial(written_out, info=info, key_info=key_info, scale=used, causal=causal), tensors
        )
        assert_equal(got, expected, 1e-12)


def test_cheaper_form():
    kimi = {"nope": 128, "v_dim": 128, "rank": 512}
    assert absorbs(1, 2, **kimi) and absorbs(170, 1_000_000, **kimi)
    assert not absorbs(171, 1_000_000, **kimi)
    assert not any(absorbs(n, n, **kimi) for n in (1, 64, 100_000))
    assert not absorbs(8, 8, nope=128, v_dim=128, rank=16)


def test_autocast():
    info = INFOS["equal rows"]
    tensors = [x.detach().float() for x in inputs(info, info)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert MaterialisedLatent(AtenSoftmax())(*tensors, info).dtype == torch.bfloat16
