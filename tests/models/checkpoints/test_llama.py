"""Llama, Qwen2 and Qwen3 against transformers: the same files give the same logits, both ways."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from models.checkpoints.config import settings_of
from models.checkpoints.families import FAMILIES, family_for, family_of
from models.checkpoints.llama import LLAMA
from models.hybrid import HybridLM
from models.mixers.gqa import GroupedQueryAttention
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.build import compose
from tests.models.checkpoints.oracle import Wide, relative_error, save_gradients
from trainer.build import build_model
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import load_weights, open_weights

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
PEERS = {
    "llama": LlamaConfig(**SIZES, eos_token_id=[2, 3], max_position_embeddings=99),
    "llama tied, scaled": LlamaConfig(
        **SIZES, tie_word_embeddings=True, head_dim=16, rope_parameters=dict(LLAMA3)
    ),
    "llama biased, linear": LlamaConfig(
        **SIZES, attention_bias=True, rope_parameters=dict(LINEAR), rms_norm_eps=1e-4
    ),
    "qwen2": Qwen2Config(**SIZES, sliding_window=16),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "qwen3, yarn": Qwen3Config(
        **SIZES, head_dim=16, rope_parameters=YARN | {"beta_fast": 9.0, "rope_theta": 500.0}
    ),
    "qwen3 biased": Qwen3Config(**SIZES | {"num_key_value_heads": 6}, attention_bias=True),
}
LENGTH = 90
TOKENS = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def make_peer(name: str):
    """Random in every tensor, in fp64."""
    with Wide():
        peer = AutoModelForCausalLM.from_config(PEERS[name], dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    for tensor in peer.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        spread = 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
        # Positive, so that norms do not cancel; rounded, so that fp32 holds it exactly.
        tensor.copy_((spread * noise + (tensor.dim() == 1)).float())
    return peer


def make_ours(folder: Path, dtype: torch.dtype) -> HybridLM:
    config = open_weights(folder).config
    model = build_model(
        config["model"],
        config["mixer"],
        vocab_size=config["model"]["vocab_size"],
        ops=Ops(),
        device="cpu",
    ).to(dtype)
    load_weights(model, folder)
    return model


def our_logits(model: HybridLM) -> Tensor:
    return model(TOKENS, SequenceInfo.span(2, 0, LENGTH)) @ model.head_weight.mT


@pytest.mark.parametrize("name", PEERS)
def test_the_same_files_give_the_same_logits_both_ways(name, tmp_path):
    peer = make_peer(name)
    peer.float().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    convert(source=str(tmp_path / "theirs"), target=str(tmp_path / "native"), format="native")
    convert(
        source=str(tmp_path / "native"),
        target=str(tmp_path / "ours"),
        format="hf",
        max_shard_gb=2e-5,
    )
    expected = peer(TOKENS).logits
    for folder in ("theirs", "native", "ours"):
        ours = our_logits(make_ours(tmp_path / folder, torch.float32))
        assert relative_error(ours, expected) < 1e-5
    with Wide():
        again, report = AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", dtype=torch.float64, output_loading_info=True
        )
        expected = again(TOKENS).logits
        expected.square().sum().backward()
    assert type(again) is type(peer) and not any(report.values()), report
    model = make_ours(tmp_path / "native", torch.float64)
    ours = our_logits(model)
    assert relative_error(ours, expected) < 1e-11
    ours.square().sum().backward()
    save_gradients(again, tmp_path / "gradients")
    gradients = open_weights(tmp_path / "gradients")
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, gradients.get(key)) < 1e-10, key
    for key, tensor in peer.state_dict().items():
        assert torch.equal(again.state_dict()[key].float(), tensor), key
    assert open_weights(tmp_path / "ours").config == open_weights(tmp_path / "theirs").config


def fields(name: str, **changes) -> dict:
    """A config.json as older transformers write it, "..." for a field that is not there."""
    hf = PEERS[name].to_dict() | {"rope_theta": 500.0, "rope_parameters": None} | changes
    return {key: value for key, value in hf.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, {}),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_factor": 4.0}),
        (
            {"rope_scaling": LLAMA3},
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
            {"rope_scaling": YARN},
        ),
        ({"rope_parameters": LINEAR | {"rope_theta": 7}}, {"rope_factor": 4.0, "rope_base": 7.0}),
    ],
)
def test_old_and_new_rotary_fields_are_read(changes, rope):
    keywords = LLAMA.import_config(fields("llama", **changes))["mixer"]["gqa"]
    expected = {"rope_base": 500.0, "rope_factor": 1.0, "rope_scaling": None}
    assert {key: keywords[key] for key in expected} == expected | rope


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama", {"hidden_size": "48"}, "hidden_size is '48'; allowed: int"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; allowed: 1 or more"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0; allowed: 1 or more"),
        ("llama", {"num_key_value_heads": 2.0}, "num_key_value_heads is 2.0; allowed: int"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; allowed: float"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; allowed: bool"),
        ("llama", {"rope_theta": [1]}, r"rope_theta is \[1\]; allowed: float"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; allowed: dict"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, r"type is \['yarn'\]; allowed: str"),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor is '8'; allowed: float"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True; qwen2 has .* allowed: False"),
        ("qwen3", {"layer_types": 2}, "layer_types is 2; allowed: list"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'; allowed"),
        ("llama", {"rope_scaling": YARN | {"mscale": 1.0}}, "mscale is 1.0; allowed: attention_f"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; it must be False"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is "),
    ],
)
def test_what_we_do_not_compute_is_refused(name, changes, reason):
    hf = fields(name, **changes)
    with pytest.raises(ValueError, match=rf"^config\.json: .*{reason}"):
        family_of(hf, source=Path("config.json")).import_config(hf)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_config_without_a_rotary_base_has_that_of_transformers(name):
    hf = fields(name, rope_theta=..., rope_parameters=...)
    (mixer,) = family_of(hf, source=Path("config.json")).import_config(hf)["mixer"].values()
    assert mixer["rope_base"] == type(PEERS[name]).from_dict(hf).rope_parameters["rope_theta"]


MOE = {"num_experts": 2, "top_k": 1, "hidden": 8, "shared_hidden": 0, "routed_scaling": 1.0}


@pytest.fixture(scope="module")
def dense():
    return compose(["model=transformer", "model.vocab_size=320", "model.moe=null"])


@pytest.mark.parametrize(
    ("mixer", "model", "family"),
    [
        ({}, {}, "llama"),
        ({"qkv_bias": True, "out_bias": True}, {"tie_embeddings": True}, "llama"),
        ({"rope_factor": 2.0}, {"init_std": 0.1}, "llama"),
        ({"qkv_bias": True}, {}, "qwen2"),
        ({"qk_norm": True}, {}, "qwen3"),
        ({"qk_norm": True, "qkv_bias": True}, {}, None),
        ({"out_bias": True}, {}, None),
        ({"output_gate": True}, {}, None),
        ({"window": 64}, {}, None),
        ({"rope_base": None}, {}, None),
        ({"rope_base": None, "rope_frequencies": [1.0] * 32}, {}, None),
        ({"norm_eps": 1e-6, "qk_norm": True}, {}, None),
        ({}, {"pattern": ["gqa", "kda"]}, None),
        ({}, {"residual_block": 2}, None),
        ({}, {"moe": MOE}, None),
        ({}, {"d_model": 258}, None),
    ],
)
def test_a_model_of_ours_has_the_family_that_holds_it(dense, mixer, model, family):
    config = copy.deepcopy(dense)
    config["model"] |= model | {"dense_layers": 0}
    config["mixer"]["gqa"] |= mixer
    found = family_for(config)
    assert found is FAMILIES[family or "longhaul"]
    if family is not None:
        again = found.import_config(found.export_config(config))
        assert again["model"] == config["model"] | {"name": family}
        assert _settings(again) == _settings(config)


def _settings(config):
    return settings_of(config["mixer"]["gqa"], GroupedQueryAttention)


def test_what_old_files_hold_beside_the_weights_is_passed_over():
    tied = {"model": {"tie_embeddings": True}}
    assert LLAMA.canonical_name("model.layers.0.self_attn.rotary_emb.inv_freq", tied) is None
    assert LLAMA.canonical_name("lm_head.weight", tied) is None
    untied = {"model": {"tie_embeddings": False}}
    assert LLAMA.canonical_name("lm_head.weight", untied) == "lm_head.weight"
