"""config.json of Kimi Linear, both ways, and what the family cannot hold."""

import copy
from pathlib import Path

import pytest

from models.checkpoints.config import layer_mixers, shortest_pattern
from models.checkpoints.families import FAMILIES, family_for, family_of
from models.checkpoints.table import published_shapes
from tests.models.build import compose, make_model

KIMI = FAMILIES["kimi_linear"]
FULL = [4, 8, 12, 16, 20, 24, 27]
# The architecture in the config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct.
RELEASED = {
    "architectures": ["KimiLinearForCausalLM"],
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL,
        "head_dim": 128,
        "kda_layers": [layer for layer in range(1, 28) if layer not in FULL],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def make_config(*overrides):
    config = compose(list(overrides))
    config["model"]["vocab_size"] = config["model"]["vocab_size"] or 320
    return config


def test_the_released_config_and_our_preset_are_one():
    ours = make_config("model=kimi_linear_48b")
    imported = KIMI.import_config(RELEASED)
    assert imported["model"] | {"name": "kimi_linear_48b"} == ours["model"]
    assert imported["mixer"] == {name: ours["mixer"][name] for name in ("kda", "mla")}
    assert KIMI.export_config(imported) == RELEASED
    assert KIMI.export_config(ours | {"tokens": imported["tokens"]}) == RELEASED


def test_the_released_tensors_fill_the_model_exactly():
    config = make_config("model=kimi_linear_48b")
    table = KIMI.key_table(config)
    model = make_model(["model=kimi_linear_48b"], device="meta")
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: entry.shape for name, entry in table.items()} == ours
    published = published_shapes(table)
    layer, mla = "model.layers.1", "model.layers.26.self_attn"
    for name, shape in {
        f"{layer}.self_attn.v_proj.weight": (4096, 2304),
        f"{layer}.self_attn.q_conv1d.weight": (4096, 1, 4),
        f"{layer}.self_attn.A_log": (1, 1, 32, 1),
        f"{layer}.self_attn.dt_bias": (4096,),
        f"{layer}.self_attn.f_a_proj.weight": (128, 2304),
        f"{layer}.self_attn.g_b_proj.weight": (4096, 128),
        f"{layer}.self_attn.b_proj.weight": (32, 2304),
        f"{layer}.self_attn.o_norm.weight": (128,),
        f"{layer}.block_sparse_moe.experts.255.w1.weight": (1024, 2304),
        f"{layer}.block_sparse_moe.experts.255.w2.weight": (2304, 1024),
        f"{layer}.block_sparse_moe.gate.e_score_correction_bias": (256,),
        f"{layer}.block_sparse_moe.shared_experts.down_proj.weight": (2304, 1024),
        f"{mla}.q_proj.weight": (6144, 2304),
        f"{mla}.kv_a_proj_with_mqa.weight": (576, 2304),
        f"{mla}.kv_b_proj.weight": (8192, 512),
        "model.layers.0.mlp.gate_proj.weight": (9216, 2304),
        "lm_head.weight": (163840, 2304),
    }.items():
        assert published[name] == shape, name
    # Per layer 2 norms; 15 tensors of KDA or 5 of MLA; 3 dense, or 2 + 256 * 3 + 3 of the mixture.
    assert len(published) == 3 + 27 * 2 + 20 * 15 + 7 * 5 + 3 + 26 * (2 + 256 * 3 + 3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.pattern=[mla]"],
        ["model.pattern=[kda]", "model.moe=null"],
        ["model.pattern=[mla,kda]", "model.dense_layers=0", "model.moe.shared_hidden=384"],
        [
            "model.dense_layers=3",
            "mixer.mla.q_rank=40",
            "model.norm_eps=1e-4",
            "mixer.kda.norm_eps=1e-4",
        ],
    ],
)
def test_our_configs_come_back(overrides):
    config = make_config("model=kimi_linear", *overrides)
    tokens = {"bos": None, "eos": 256, "pad": 257, "length": 4096}
    hf = KIMI.export_config(config | {"tokens": tokens})
    imported = KIMI.import_config(hf)
    expected = copy.deepcopy(config["model"])
    if expected["moe"] is None:
        expected["dense_layers"] = 0
    assert imported["model"] == expected
    for name in layer_mixers(config["model"]):
        assert imported["mixer"][name] == config["mixer"][name]
    assert imported["tokens"] == tokens


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model=transformer"], "mixer.gqa is .*GroupedQueryAttention; kimi_linear has only KDA"),
        (["model=mla"], "mixer.mla.rope_base is 10000.0; .* only None"),
        (["model=kimi_linear_attnres"], "model.residual_block is 4; .* only None"),
        (["model.tie_embeddings=true"], "model.tie_embeddings is True; .* only False"),
        (["mixer.kda.gate_lower_bound=-5.0"], "mixer.kda.gate_lower_bound is -5.0"),
        (["mixer.kda.full_rank_gate=true"], "mixer.kda.full_rank_gate is True"),
        (["mixer.mla.output_gate=true"], "mixer.mla.output_gate is True"),
        (["mixer.mla.rope_frequencies=[1,1,1,1,1,1,1,1]"], "rope_frequencies is .* only None"),
        (["mixer.mla.norm_eps=1e-5"], "mixer.mla.norm_eps is 1e-05; .* only 1e-06"),
        (["model.norm_eps=1e-6"], "mixer.kda.norm_eps is 1e-05; .* only 1e-06"),
        (["model.moe.shared_hidden=0"], "model.moe.shared_hidden is 0"),
        (["model.moe.shared_hidden=100"], "multiple of model.moe.hidden = 128"),
    ],
)
def test_what_the_family_cannot_hold_is_named(overrides, reason):
    config = make_config(*overrides)
    with pytest.raises(ValueError, match=reason):
        KIMI.export_config(config)
    assert family_for(config) is FAMILIES["longhaul"]


def test_two_sizes_of_one_mixer_are_refused():
    config = make_config("model=kimi_linear")
    config["mixer"]["wide"] = config["mixer"]["kda"] | {"num_heads": 8}
    config["model"]["pattern"] = ["kda", "wide", "mla"]
    with pytest.raises(ValueError, match=r"mixer\.kda and mixer\.wide differ"):
        KIMI.export_config(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"mla_use_nope": False}, "mla_use_nope is False"),
        ({"gate_lower_bound": -5.0}, "gate_lower_bound is -5.0"),
        ({"n_group": 4}, "num_expert_group is 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": True}, "hidden_size is True; allowed: int"),
        ({"q_lora_rank": "no"}, r"q_lora_rank is 'no'; allowed: int \| None"),
        ({"linear_attn_config": [4]}, r"linear_attn_config is \[4\]; allowed: dict"),
        (
            {"linear_attn_config": RELEASED["linear_attn_config"] | {"kda_layers": ["1"]}},
            r"kda_layers is \['1'\]; allowed: list\[int\]",
        ),
        ({"num_hidden_layers": 28}, "linear_attn_config must give each of 28 layers KDA or MLA"),
        ({"layer_types": ["full_attention"] * 26}, "layer_types must give each of 27 layers"),
        ({"mlp_layer_types": ["sparse"] * 26 + ["dense"]}, "dense ones first"),
    ],
)
def test_what_we_do_not_compute_is_refused(changes, reason):
    hf = {name: value for name, value in (RELEASED | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=rf"config\.json: .*{reason}"):
        KIMI.import_config(hf)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match=r"x/config\.json: model_type is 'gpt2'; known are"):
        family_of({"model_type": "gpt2"}, source=Path("x/config.json"))


@pytest.mark.parametrize(
    ("layers", "pattern"), [("aaa", "a"), ("aabaab", "aab"), ("aabaa", "aab"), ("abb", "abb")]
)
def test_the_shortest_pattern(layers, pattern):
    found = shortest_pattern(list(layers))
    assert found == list(pattern)
    assert layer_mixers({"pattern": found, "num_layers": len(layers)}) == list(layers)
