"""Attention into latent attention: exact where a step says so, and no worse than it must be."""

import math

import pytest
import torch

from models.convert.converted import Converted
from models.convert.latent import to_latent
from models.convert.low_rank import power
from models.convert.measure import errors
from models.convert.options import LatentOptions
from models.convert.source import read_attention
from models.rope import Rope
from tests.models.convert.attention import (
    BIASED,
    D_MODEL,
    Teacher,
    inputs,
    make,
    moment,
    rows,
    teacher,
)

FULL = {"kv_rank": "full", "rope_dim": "full", "low_rank": "pca"}
TEACHERS = [
    {},
    BIASED,
    {"qkv_bias": True, "num_heads": 6},
    {"num_kv_heads": 4, "output_gate": True},
    {"head_dim": 16, "rope_base": None},
    {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
]
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def convert(source: Teacher, **options) -> Converted:
    made = LatentOptions(**(FULL | options))
    return to_latent(source.section, source.tensors, moment(), made)


def output_error(source: Teacher, made: Converted) -> float:
    """Of the mixer by its own forward pass, gate included."""
    mixer = make(made.section)
    made.fill(mixer)
    difference = total = 0.0
    for x, info in inputs():
        exact = source.mixer(x, info)
        difference += (mixer(x, info) - exact).square().sum().item()
        total += exact.square().sum().item()
    return math.sqrt(difference / total)


def step_errors(source: Teacher, made: Converted) -> dict[str, float]:
    """Of the scores."""
    attention = read_attention(source.section, source.tensors)
    found = errors(attention, [stage.form for stage in made.stages], rows())
    return {s.name.split()[0]: e.scores for s, e in zip(made.stages, found, strict=True)}


@pytest.mark.parametrize("keywords", TEACHERS, ids=str)
@pytest.mark.parametrize("rope", ["select", "rorope"])
def test_at_full_sizes_nothing_changes(rope, keywords):
    source = teacher(**keywords)
    for options in ({}, {"q_rank": "full"}, {"full_kv_heads": True}):
        made = convert(source, rope=rope, **options)
        assert all(stage.exact for stage in made.stages)
        assert max(step_errors(source, made).values()) < 1e-12
        assert output_error(source, made) < 1e-11


def test_the_latent_is_as_wide_as_it_must_be():
    """Two key heads of 8: values and keys without rotary channels, at most the input and a bias."""
    wide = teacher()
    for options, rank in (
        ({"rope": "select"}, 16),
        ({"rope": "rorope"}, 16),
        ({"rope": "select", "rope_dim": 4}, 24),
        ({"rope": "rorope", "rope_dim": 4}, 28),
        ({"rope": "zebra", "rope_dim": 4}, 32),
    ):
        assert convert(wide, **options).section["kv_rank"] == rank
    many = teacher(num_heads=8, num_kv_heads=8)
    assert convert(many, rope="rorope", rope_dim=4, freqfold=2).section["kv_rank"] == D_MODEL
    biased = teacher(num_heads=8, num_kv_heads=8, qkv_bias=True)
    made = convert(biased, rope="rorope", rope_dim=4, q_rank="full")
    assert made.section["kv_rank"] == made.section["q_rank"] == D_MODEL + 1


def test_without_positions_partial_ropes_are_exact():
    source = teacher(rope_base=None, **BIASED)
    for options in (
        {"rope": "select", "rope_dim": 4},
        {"rope": "rorope", "rope_dim": 4, "freqfold": 2},
    ):
        made = convert(source, **options)
        assert made.section["rope_base"] is None and made.section["rope_frequencies"] is None
        assert all(stage.exact for stage in made.stages)
        assert output_error(source, made) < 1e-11


@pytest.mark.parametrize("keywords", [{}, {"rope_scaling": SCALING, "rope_factor": 2.0}])
def test_rorope_keeps_the_frequencies_of_a_rope_of_its_size(keywords):
    source = teacher(head_dim=16, **keywords)
    made = convert(source, rope="rorope", rope_dim=4, freqfold=4, kv_rank=20)
    for key in ("rope_base", "rope_scaling", "rope_factor", "rope_frequencies"):
        assert made.section.get(key) == source.section.get(key)
    attention = read_attention(source.section, source.tensors)
    assert torch.equal(made.stages[-1].form.frequencies, attention.frequencies[::4])


@pytest.mark.parametrize(
    ("pairs", "kept"), [("high", [0, 1]), ("low", [2, 3]), ("uniform", [0, 2])]
)
def test_select_keeps_pairs_as_they_are(pairs, kept):
    """A teacher whose other pairs are nothing is converted exactly."""
    source = teacher(**BIASED)
    lost = [i for i in range(4) if i not in kept]
    for name in ("qkv_proj.weight", "qkv_proj.bias"):
        x = source.tensors[name]
        x.unflatten(0, (-1, 2, 4))[:4, :, lost] = 0
    made = convert(source, rope="select", rope_dim=4, pairs=pairs)
    assert output_error(source, made) < 1e-11
    turns = Rope(8, base=100.0).radians(torch.zeros((), dtype=torch.float64))
    assert made.section["rope_frequencies"] == turns[kept].repeat(2).tolist()
    assert output_error(source, convert(source, rope="select", rope_dim=2, pairs=pairs)) > 0.01


def test_select_by_norm_chooses_for_each_key_head():
    source = teacher()
    weight = source.tensors["qkv_proj.weight"].unflatten(0, (8, 2, 4))
    for head, pair in ((4, 3), (5, 1)):  # of the keys
        weight[head, :, pair] *= 20
    made = convert(source, rope="select", rope_dim=2, pairs="norm")
    turns = Rope(8, base=100.0).radians(torch.zeros((), dtype=torch.float64))
    assert made.section["rope_frequencies"] == turns[[3, 1]].tolist()
    by_norm = step_errors(source, made)["partial"]
    assert by_norm < step_errors(source, convert(source, rope="select", rope_dim=2))["partial"]


def test_rorope_finds_what_heads_have_in_common():
    """Keys of all heads that are multiples of one head's are exact with that head's channels."""
    source = teacher(num_kv_heads=4)
    keys = source.tensors["qkv_proj.weight"].unflatten(0, (12, 8))[4:8]
    keys[1:] = keys[0] * torch.tensor([-2.0, 0.5, 3.0], dtype=keys.dtype)[:, None, None]
    made = convert(source, rope="rorope", rope_dim=8)
    assert step_errors(source, made)["partial"] < 1e-12
    assert output_error(source, made) < 1e-11


def lost(made: Converted) -> tuple[float, float]:
    """Mean square of what keys and values lose in the latent, over the data."""
    parted, latent = made.stages[-2].form, made.stages[-1].form
    differences = latent.key_nope - parted.key_nope, latent.value - parted.value
    keys, values = (power(x, moment()).sum().item() for x in differences)
    return keys, values


def test_folded_frequencies_are_not_exact():
    """Even of one key head with all its channels."""
    made = convert(teacher(num_kv_heads=1), rope="rorope", rope_dim=8, freqfold=2)
    assert [stage.exact for stage in made.stages] == [False, True]
    assert convert(teacher(num_kv_heads=1), rope="rorope", rope_dim=8).stages[0].exact


def test_data_chooses_the_better_latent():
    source = teacher(**BIASED)
    sizes = {"rope": "rorope", "rope_dim": 8, "kv_rank": 14}
    by_data, by_weights = convert(source, **sizes), convert(source, low_rank="svd", **sizes)
    assert step_errors(source, by_data)["rotation"] < 1e-12
    assert sum(lost(by_data)) < sum(lost(by_weights))
    assert output_error(source, by_data) < output_error(source, by_weights)


def test_balance_moves_the_rank_between_keys_and_values():
    made = [
        lost(convert(teacher(), rope="rorope", rope_dim=8, kv_rank=12, balance=balance))
        for balance in (0.01, 1.0, 100.0)
    ]
    assert made[0][0] > made[1][0] > made[2][0]
    assert made[0][1] < made[1][1] < made[2][1]


def test_latent_norms_keep_the_size_of_latents():
    source = teacher(**BIASED)
    sizes = {"rope": "rorope", "rope_dim": 8, "kv_rank": 20, "q_rank": 30}
    made = convert(source, latent_norm=True, **sizes)
    mixer = make(made.section)
    made.fill(mixer)
    x = torch.cat([x for x, _ in inputs()], dim=1)
    for latents, norm in (
        (mixer.kv_down(x)[..., :20], mixer.kv_norm),
        (mixer.q_down(x), mixer.q_norm),
    ):
        torch.testing.assert_close(
            norm.weight, latents.square().mean().sqrt().expand_as(norm.weight)
        )
    assert output_error(source, made) < 1.0


def test_zebra_starts_as_published():
    """The published initialisation, written down from the singular value decompositions."""
    source = teacher()
    made = convert(source, rope="zebra", rope_dim=4, kv_rank=14, q_rank=12, low_rank="svd")
    mixer = make(made.section)
    made.fill(mixer)
    query, key, value = source.tensors["qkv_proj.weight"].split([32, 16, 16])

    def low(x: torch.Tensor, rank: int) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(x)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    # DeepSeek's rotation takes neighbouring channels, ours those half a head apart.
    order = [4, 6, 5, 7]
    query = low(query, 12).unflatten(0, (4, 8))
    product = mixer.q_up.weight @ mixer.q_down.weight
    expected = torch.cat([query[:, :4], query[:, order]], dim=1)
    torch.testing.assert_close(product.unflatten(0, (4, 8)), expected)
    rope_key = key.unflatten(0, (2, 8))[:, order].mean(0)
    torch.testing.assert_close(mixer.kv_down.weight[14:], rope_key)
    joint = low(torch.cat([key, value]), 14).unflatten(0, (2, 2, 8))
    expected = torch.cat([joint[0, :, :4], joint[1]], dim=1)
    product = mixer.kv_up.weight @ mixer.kv_down.weight[:14]
    torch.testing.assert_close(product.unflatten(0, (2, 12)), expected)
    assert torch.equal(mixer.out_proj.weight, source.tensors["out_proj.weight"])
    assert made.section["rope_base"] == 100.0 and made.section["num_kv_heads"] == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rope": "rorope", "kv_rank": 17}, "kv_rank is 17; allowed: 1 to 16, or full"),
        ({"rope": "select", "kv_rank": 0}, "kv_rank is 0; allowed: 1 or more, or full"),
        ({"rope": "select", "q_rank": 33}, "q_rank is 33; allowed: 1 to 32, or full"),
        ({"rope": "select", "rope_dim": 3}, "rope_dim is 3; allowed: even numbers up to 8"),
        ({"rope": "zebra", "rope_dim": 8}, "rope_dim is 8; allowed: even numbers up to 6"),
        ({"rope": "zebra"}, "rope_dim is full; rope=zebra allows"),
        ({"rope": "rorope", "rope_dim": 6}, "rope_dim is 6; .*must divide 8"),
        (
            {"rope": "rorope", "rope_dim": 4, "freqfold": 1},
            "freqfold is 1; .*multiples of 2 that divide 4, or null for 2",
        ),
        (
            {"rope": "rorope", "freqfold": 2},
            "freqfold is 2; with rope_dim=full allowed: 1, or null",
        ),
        ({"rope": "rorope", "balance": 0.0}, "balance is 0.0; allowed: above 0, or null"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, reason):
    with pytest.raises(ValueError, match=reason):
        convert(teacher(), **options)


def test_norms_of_key_heads_are_refused():
    with pytest.raises(ValueError, match=r"qk_norm is true; .* allowed: false, or recipe=linear"):
        convert(teacher(qk_norm=True), rope="select")
