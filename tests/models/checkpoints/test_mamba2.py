"""Mamba-2 against transformers, alone and beside attention: logits and gradients."""

import pytest
import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from models.checkpoints import mamba2
from models.checkpoints.families import FAMILIES
from models.checkpoints.table import Entry, KeyTable, Part, same
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.build import compose
from tests.models.checkpoints.oracle import Wide, randomise_peer, relative_error
from tests.models.checkpoints.test_kimi_linear import (
    TOLERANCE,
    check_gradients,
    loss_of,
    make_ours,
    make_tokens,
    our_logits,
)
from trainer.build import build_model
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import open_weights
from trainer.errors import ConfigError

COMMON = {
    "vocab_size": 96,
    "hidden_size": 24,
    "num_heads": 6,
    "head_dim": 8,
    "state_size": 10,
    "num_hidden_layers": 2,
    "residual_in_fp32": False,
    "chunk_size": 32,
    "pad_token_id": None,
}
SHAPES = {
    "one group": {"n_groups": 1},
    "groups": {
        "n_groups": 3,
        "use_conv_bias": False,
        "conv_kernel": 3,
        "time_step_limit": (0.1, 0.8),
        "layer_norm_epsilon": 1e-4,
        "tie_word_embeddings": True,
    },
}


def make_peer(shape: str) -> Mamba2ForCausalLM:
    peer = Mamba2ForCausalLM(Mamba2Config(**COMMON, **SHAPES[shape]))
    randomise_peer(peer)
    return peer


def info_of(length: int) -> SequenceInfo:
    return SequenceInfo.from_lengths([[length]])


@pytest.mark.parametrize("length", [1, 130])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape, length, tmp_path):
    peer = make_peer(shape)
    peer.save_pretrained(tmp_path / "theirs")
    model, tokens = make_ours(tmp_path / "theirs"), make_tokens(length)
    theirs = peer(tokens).logits
    ours = our_logits(model, tokens, info_of(length))
    assert relative_error(ours, theirs) < TOLERANCE
    loss_of(theirs, tokens).backward()
    loss_of(ours, tokens).backward()
    check_gradients(model, peer, tmp_path / "gradients")


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_what_we_write(shape, tmp_path):
    make_peer(shape).save_pretrained(tmp_path / "theirs")
    convert(source=str(tmp_path / "theirs"), target=str(tmp_path / "native"), format="native")
    convert(source=str(tmp_path / "native"), target=str(tmp_path / "ours"), format="hf")
    peer, report = Mamba2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    tokens = make_tokens(65)
    ours = our_logits(make_ours(tmp_path / "native"), tokens, info_of(65))
    assert relative_error(ours, peer(tokens).logits) < TOLERANCE
    peer.save_pretrained(tmp_path / "again")
    first, again = open_weights(tmp_path / "theirs"), open_weights(tmp_path / "again")
    assert first.config == again.config
    for name in first.shapes:
        assert torch.equal(first.get(name), again.get(name)), name


def granite_table(config: dict) -> KeyTable:
    """Where our tensors lie in a GraniteMoeHybrid without experts."""
    model, gqa, attention = config["model"], config["mixer"]["gqa"], "self_attn"
    d_model, hidden = model["d_model"], model["ffn"]["hidden"]
    heads, dim = [gqa["num_heads"], gqa["num_kv_heads"], gqa["num_kv_heads"]], gqa["head_dim"]
    stops = [dim * sum(heads[: i + 1]) for i in range(3)]
    names = dict(zip("qkv", zip(heads, stops, strict=True), strict=True))
    embedding = (model["vocab_size"], d_model)
    table = {
        "embed.weight": same("model.embed_tokens.weight", embedding),
        "norm.weight": same("model.norm.weight", (d_model,)),
        "head.weight": same("lm_head.weight", embedding),
    }
    for i, kind in enumerate(model["pattern"]):
        theirs = f"model.layers.{i}"
        layer = {
            "mixer_norm.weight": same(f"{theirs}.input_layernorm.weight", (d_model,)),
            "ffn_norm.weight": same(f"{theirs}.post_attention_layernorm.weight", (d_model,)),
            "ffn.gate_up.weight": same(
                f"{theirs}.shared_mlp.input_linear.weight", (2 * hidden, d_model)
            ),
            "ffn.down.weight": same(f"{theirs}.shared_mlp.output_linear.weight", (d_model, hidden)),
        }
        if kind == "mamba2":
            layer |= mamba2._mamba2(f"{theirs}.mamba", d_model, config["mixer"]["mamba2"])
        else:
            parts = (
                Part(
                    f"{theirs}.{attention}.{x}_proj.weight",
                    (count * dim, d_model),
                    (slice(stop - count * dim, stop),),
                )
                for x, (count, stop) in names.items()
            )
            layer["mixer.qkv_proj.weight"] = Entry((stops[-1], d_model), tuple(parts))
            layer["mixer.out_proj.weight"] = same(
                f"{theirs}.{attention}.o_proj.weight", (d_model, heads[0] * dim)
            )
        table |= {f"layers.{i}.{name}": entry for name, entry in layer.items()}
    return table


def test_a_hybrid_with_attention_is_that_of_transformers():
    peer = GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            vocab_size=96,
            hidden_size=24,
            num_hidden_layers=3,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_multiplier=6**-0.5,
            num_local_experts=0,
            shared_intermediate_size=40,
            mamba_n_heads=6,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_d_state=10,
            mamba_chunk_size=32,
            pad_token_id=None,
        )
    )
    randomise_peer(peer.double())
    config = compose(
        [
            "model=transformer",
            "model.d_model=24",
            "model.num_layers=3",
            "model.pattern=[mamba2,gqa,mamba2]",
            "model.ffn.hidden=40",
            "model.moe=null",
            "model.norm_eps=1e-6",
            *(f"mixer.mamba2.{x}" for x in ("num_heads=6", "head_dim=8", "num_groups=2")),
            *(f"mixer.mamba2.{x}" for x in ("state_dim=10", "norm_eps=1e-6")),
            *(f"mixer.gqa.{x}" for x in ("num_heads=4", "num_kv_heads=2", "head_dim=6")),
            "mixer.gqa.rope_base=null",
        ]
    )
    config["model"]["vocab_size"] = 96
    model = build_model(config["model"], config["mixer"], vocab_size=96, ops=Ops(), device="cpu")
    model.double()
    table, weights = granite_table(config), dict(peer.named_parameters())
    model.load_state_dict({name: entry.join(weights.__getitem__) for name, entry in table.items()})
    tokens = make_tokens(130)
    ours = our_logits(model, tokens, info_of(130))
    with Wide():
        theirs = peer(tokens).logits
        loss_of(theirs, tokens).backward()
    assert relative_error(ours, theirs) < 1e-10
    loss_of(ours, tokens).backward()
    for name, parameter in model.named_parameters():
        expected = table[name].join(lambda published: weights[published].grad)
        assert relative_error(parameter.grad, expected) < 1e-9, name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mixer.mamba2.num_kv_heads=2", "mixer.mamba2.num_kv_heads is 2; this model family has"),
        ("model.pattern=[mamba2,kda]", "mixer.kda is models.mixers.kda.KimiDeltaAttention; mamba2"),
        ("model.ffn={hidden:8}", "model.ffn is {'hidden': 8}; mamba2 has only None"),
        ("mixer.mamba2.num_heads=3", "num_heads times head_dim is 192; mamba2 needs a multiple"),
    ],
)
def test_what_the_family_cannot_hold_is_named(override, message):
    config = compose(["model=mamba2", override])
    config["model"]["vocab_size"] = 320
    with pytest.raises(ValueError) as error:
        mamba2.export_config(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("family", ["kimi_linear", "llama"])
def test_other_families_have_feed_forward_layers(family):
    config = compose(["model=transformer", "model.ffn=null", "model.moe=null"])
    with pytest.raises(ValueError, match=f"model.ffn is null; {family} has a feed-forward in"):
        FAMILIES[family].export_config(config)


def test_a_config_that_we_do_not_compute_is_refused(tmp_path):
    Mamba2Config(**COMMON, use_bias=True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config.json: use_bias is True; it must be False"):
        make_ours(tmp_path)
