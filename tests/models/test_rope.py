"""Rotary embedding against transformers' own, and its law."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.rope import Rope
from models.rope_scaling import make_scaling
from models.sequence import SequenceInfo
from tests.helpers import INFOS, random_tensors

# Of four frequencies one is kept, two lie between and one is divided.
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 150,
}
# Of four frequencies the first is kept and the last divided; whole pairs bound what lies between.
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 150,
    "beta_fast": 8.0,
}


def by_transformers(x, info, **parameters):
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=3, head_dim=8, rope_parameters=parameters
    )
    cos, sin = LlamaRotaryEmbedding(config)(x, info.positions)
    return apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)


@pytest.mark.parametrize(
    ("keywords", "parameters"),
    [
        ({}, {"rope_type": "default"}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        *(
            ({"scaling": make_scaling(keys)}, {"rope_type": "llama3", **keys})
            for keys in (
                LLAMA3,
                YARN,
                YARN | {"truncate": False, "beta_slow": 2.0},
                YARN | {"attention_factor": 0.7, "factor": 0.5},
            )
        ),
    ],
)
def test_equals_transformers(keywords, parameters):
    info = INFOS["scattered"]
    (x,) = random_tensors((*info.shape, 3, 8), dtype=torch.float32)
    expected = by_transformers(x, info, rope_theta=500.0, **parameters)
    got = Rope(8, base=500.0, **keywords)(x, info)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_yarn_keeps_blends_and_divides_and_lengthens():
    plain = 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    rule = make_scaling(YARN)
    ratios = rule.apply(plain, 500.0) / plain
    assert ratios[0] == 1 and ratios[3] == 1 / 8
    assert 1 > ratios[1] > ratios[2] > 1 / 8
    assert rule.magnitude == pytest.approx(0.1 * math.log(8) + 1)


def test_the_rule_of_llama_3_keeps_blends_and_divides():
    plain = 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    ratios = make_scaling(LLAMA3).apply(plain, 500.0) / plain
    assert ratios[0] == 1 and ratios[3] == 1 / 8
    assert 1 > ratios[1] > ratios[2] > 1 / 8


def test_given_frequencies_turn_the_pairs_and_stay():
    info = INFOS["scattered"]
    (x,) = random_tensors((*info.shape, 3, 8))
    kept = [500.0 ** (-i / 8) for i in (0, 2, 4, 6)]
    rope = Rope(8, base=None, frequencies=kept)
    torch.testing.assert_close(rope(x, info), Rope(8, base=500.0)(x, info), rtol=0, atol=1e-12)
    rope.set()
    for setting in ({"base": 7.0}, {"factor": 5.0}):
        with pytest.raises(ValueError, match="rope_frequencies are given; allowed: no other base"):
            rope.set(**setting)


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
    start = {"base": 500.0, "factor": 2.0, "scaling": make_scaling(LLAMA3)}
    rope = Rope(8, **start)
    for setting in ({"base": 7.0}, {"factor": 5.0}, {"base": 7.0, "factor": 5.0}, {}):
        rope.set(**setting)
        made = Rope(8, **start | setting)
        assert torch.equal(rope(x, info), made(x, info))
    assert not rope.state_dict()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dim": 7}, "even head dim, got 7"),
        ({"factor": 0}, "rope_factor is 0"),
        ({"base": None}, "rope_base is None"),
        ({"base": None, "frequencies": [1.0]}, "are 1; 8 rotary channels have 4 pairs"),
        ({"frequencies": [1.0] * 4}, "rope_frequencies are given; they go with rope_base null"),
    ],
)
def test_what_makes_no_sense_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        Rope(**{"dim": 8} | keywords)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_freq_factor": 6.0}, "low_freq_ < high_freq_factor"),
        ({"factor": 0}, "factor and length must be above 0"),
        ({"beta": 1}, "its keys are rope_type, factor, low_freq_factor"),
        ({"factor": "8x"}, "its keys are rope_type, factor, low_freq_factor"),
        ({"rope_type": "ntk"}, "'ntk'; allowed: llama3, yarn"),
        (YARN | {"beta_slow": 8.0}, "beta_slow < beta_fast"),
        (YARN | {"attention_factor": 0}, "attention_factor must be above 0"),
        ({"rope_type": "yarn"}, "its keys are rope_type, factor, original_max"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(changes, message):
    keys = changes if changes.get("beta_fast") else LLAMA3 | changes
    with pytest.raises(ValueError, match=f"rope_scaling.* is .*{message}"):
        make_scaling(keys)
