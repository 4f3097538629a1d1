"""Rotary embedding against transformers' own, and its law."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.rope import Rope
from models.sequence import SequenceInfo
from tests.helpers import INFOS, random_tensors


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_equals_transformers(factor):
    info = INFOS["scattered"]
    (x,) = random_tensors((*info.shape, 3, 8), dtype=torch.float32)
    scaling = {"rope_type": "linear", "factor": factor, "rope_theta": 500.0}
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=scaling)
    cos, sin = LlamaRotaryEmbedding(config)(x, info.positions)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    got = Rope(8, base=500.0, factor=factor)(x, info)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_only():
    q, k = random_tensors((1, 1, 1, 8), (1, 1, 1, 8))

    def score(i: int, j: int):
        at = [SequenceInfo.span(1, t, t + 1) for t in (i, j)]
        return (Rope(8)(q, at[0]) * Rope(8)(k, at[1])).sum()

    torch.testing.assert_close(score(1_000_007, 1_000_003), score(4, 0), rtol=0, atol=1e-7)
    assert abs(score(5, 0) - score(4, 0)) > 1e-3


def test_angles_are_wide_under_bf16():
    info = SequenceInfo.span(1, 100_000, 100_004)
    (x,) = random_tensors((1, 4, 1, 8), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Rope(8)(x, info)
    expected = Rope(8)(x.double(), info)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() <= 0.01 * expected.abs().max()


def test_a_setting_holds_until_the_next_and_none_is_what_it_was_made_with():
    info = INFOS["scattered"]
    (x,) = random_tensors((*info.shape, 3, 8))
    rope = Rope(8, base=500.0, factor=2.0)
    for setting in ({"base": 7.0}, {"factor": 5.0}, {"base": 7.0, "factor": 5.0}, {}):
        rope.set(**setting)
        made = Rope(8, **{"base": 500.0, "factor": 2.0} | setting)
        assert torch.equal(rope(x, info), made(x, info))
    assert not rope.state_dict()


def test_odd_dim_is_refused():
    with pytest.raises(ValueError, match="even head dim, got 7"):
        Rope(7)
    with pytest.raises(ValueError, match="rope_factor is 0"):
        Rope(8, factor=0)
