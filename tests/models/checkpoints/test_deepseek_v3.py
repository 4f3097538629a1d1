"""DeepSeek-V3's form with dense feed-forwards: transformers' own model, both ways."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from models.checkpoints.families import FAMILIES
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.build import randomise
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import open_weights
from trainer.errors import ConfigError
from trainer.load import load_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 2,
    "num_mtp_layers": 0,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
PEERS = {
    "yarn": {"q_lora_rank": None, "rope_parameters": YARN},
    "plain": {"q_lora_rank": None, "tie_word_embeddings": True},
    "biased": {
        "q_lora_rank": 14,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
}


@pytest.fixture(scope="module", params=PEERS)
def peer(request, tmp_path_factory) -> tuple[DeepseekV3ForCausalLM, Path]:
    """In fp64, and the folder it is in."""
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **PEERS[request.param])).double()
    folder = tmp_path_factory.mktemp("peer")
    randomise(model).save_pretrained(folder)
    return model, folder


def test_logits_are_those_of_transformers_and_the_way_back_is_exact(peer, tmp_path):
    model, folder = peer
    tokens = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(1))
    cpu = torch.device("cpu")
    ours = load_model(str(folder), ops=Ops(), device=cpu, dtype=torch.float64, vocab_size=96)
    found = ours(tokens, SequenceInfo.span(2, 0, 20)) @ ours.head_weight.T
    with torch.no_grad():
        expected = model(tokens).logits
    assert (found - expected).norm() < 1e-6 * expected.norm()  # their frequencies are in fp32
    back = convert(source=str(folder), target=str(tmp_path / "back"), format="hf")
    again = DeepseekV3ForCausalLM.from_pretrained(back, dtype=torch.float64)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_interleave": False}, "rope_interleave is False; it must be True"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace is 1; it must be num_hidden_layers"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1; latent attention has"),
        (
            {"rope_parameters": YARN | {"mscale_all_dim": 1.0}},
            "mscale_all_dim is 1.0; allowed: att",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "rope_type is 'dynamic'",
        ),
    ],
)
def test_what_is_not_computed_is_refused(peer, tmp_path, changes, reason):
    hf = json.loads((peer[1] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ConfigError, match=reason):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latent_norm": False}, "latent_norm is False; this model family has only True"),
        ({"num_kv_heads": 1}, "num_kv_heads is 1; this model family has only None"),
        ({"bias": True, "q_rank": None}, "bias is true and q_rank null; deepseek_v3 has none"),
        ({"nope_dim": 0}, "nope_dim is 0"),
        ({"rope_base": None}, "rope_base is None"),
    ],
)
def test_what_it_cannot_hold_is_named(peer, changes, reason):
    config = open_weights(peer[1]).config
    mixer = config["mixer"]["mla"] | changes
    with pytest.raises(ValueError, match=reason):
        FAMILIES["deepseek_v3"].export_config(config | {"mixer": {"mla": mixer}})
