"""Mamba-2 in the form Hugging Face has it: names, shapes and config.json; arXiv 2405.21060."""

import math
import re

from models.checkpoints.config import (
    MODEL_FIELDS,
    TOKEN_FIELDS,
    Config,
    check_fields,
    check_model,
    field,
    keywords,
    layer_mixers,
    model_keywords,
    optional,
    shared_keywords,
    target,
)
from models.checkpoints.table import KeyTable, same
from models.mixers.mamba2 import Mamba2

# Our keyword -> field of config.json.
OWN_FIELDS = MODEL_FIELDS | {"norm_eps": "layer_norm_epsilon"}
MIXER_FIELDS = {
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "state_dim": "state_size",
    "num_groups": "n_groups",
    "conv_width": "conv_kernel",
    "conv_bias": "use_conv_bias",
}
STEPS = ("step_min", "step_max")

# The one value that HybridLM computes; written, and demanded where it stands.
FIXED: Config = {"hidden_act": "silu", "use_bias": False}
INFINITY = {"__float__": "Infinity"}  # as transformers writes it, JSON having none
MODEL_FIXED: Config = {"ffn": None, "moe": None, "residual_block": None}


def canonical_name(name: str, config: Config) -> str | None:
    """The released name of a tensor that was found under `name`, None for the second copy of tied
    embeddings."""
    if name == "lm_head.weight" and config["model"]["tie_embeddings"]:
        return None
    return re.sub(r"\.embedding\.", ".embeddings.", name)


def key_table(config: Config) -> KeyTable:
    """Our tensors and where the published ones lie in them.

    Raises ValueError for a model that this family cannot hold.
    """
    model, mixer = config["model"], _mixer(config)
    d_model, embedding = model["d_model"], (model["vocab_size"], model["d_model"])
    table = {
        "embed.weight": same("backbone.embeddings.weight", embedding),
        "norm.weight": same("backbone.norm_f.weight", (d_model,)),
    }
    if not model["tie_embeddings"]:
        table["head.weight"] = same("lm_head.weight", embedding)
    for i in range(model["num_layers"]):
        theirs = f"backbone.layers.{i}"
        layer = {"mixer_norm.weight": same(f"{theirs}.norm.weight", (d_model,))}
        layer |= _mamba2(f"{theirs}.mixer", d_model, mixer)
        table |= {f"layers.{i}.{name}": entry for name, entry in layer.items()}
    return table


def _mamba2(theirs: str, d_model: int, mixer: Config) -> KeyTable:
    heads, width = mixer["num_heads"], mixer["conv_width"]
    inner = heads * mixer["head_dim"]
    channels = inner + 2 * mixer["num_groups"] * mixer["state_dim"]
    table = {
        "in_proj.weight": same(f"{theirs}.in_proj.weight", (inner + channels + heads, d_model)),
        "conv_weight": same(
            f"{theirs}.conv1d.weight", (channels, width), published=(channels, 1, width)
        ),
        "time_step.log_rate": same(f"{theirs}.A_log", (heads,)),
        "time_step.bias": same(f"{theirs}.dt_bias", (heads,)),
        "skip.weight": same(f"{theirs}.D", (heads,)),
        "out_norm.weight": same(f"{theirs}.norm.weight", (inner,)),
        "out_proj.weight": same(f"{theirs}.out_proj.weight", (d_model, inner)),
    }
    if mixer["conv_bias"]:
        table["conv_bias"] = same(f"{theirs}.conv1d.bias", (channels,))
    return {f"mixer.{name}": entry for name, entry in table.items()}


def export_config(config: Config) -> Config:
    """config.json for our `model`, `mixer` and, where known, `tokens`.

    Raises ValueError for a model that this family cannot hold.
    """
    model, mixer, tokens = config["model"], _mixer(config), config.get("tokens", {})
    most = INFINITY if mixer["step_max"] is None else mixer["step_max"]
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        **FIXED,
        **{theirs: model[ours] for ours, theirs in OWN_FIELDS.items()},
        "tie_word_embeddings": model["tie_embeddings"],
        **{theirs: mixer[ours] for ours, theirs in MIXER_FIELDS.items()},
        **{theirs: tokens.get(ours) for ours, theirs in TOKEN_FIELDS.items()},
        "expand": mixer["num_heads"] * mixer["head_dim"] // model["d_model"],
        "residual_in_fp32": False,
        "time_step_limit": [mixer["step_min"], most],
    }


def _mixer(config: Config) -> Config:
    """The keywords of the layers' mixer."""
    model = config["model"]
    check_model(model, MODEL_FIXED, family="mamba2")
    fixed = {"norm_eps": model["norm_eps"]}
    names, mixer = shared_keywords(config, Mamba2, held=[*MIXER_FIELDS, *STEPS], fixed=fixed)
    for name in set(layer_mixers(model)) - names:
        raise ValueError(
            f"mixer.{name} is {config['mixer'][name]['_target_']}; mamba2 has only Mamba-2"
        )
    inner = mixer["num_heads"] * mixer["head_dim"]
    if inner % model["d_model"]:
        raise ValueError(
            f"num_heads times head_dim is {inner}; mamba2 needs a multiple of model.d_model = "
            f"{model['d_model']}"
        )
    return mixer


def import_config(hf: Config) -> Config:
    """Our `model`, `mixer` and `tokens` for a config.json.

    Raises ValueError for a missing field, and for a value that HybridLM does not compute.
    """
    check_fields(hf, FIXED)
    limits = optional(hf, "time_step_limit", list, [0.0, INFINITY])
    if len(limits) != 2:
        raise ValueError(f"config.json: time_step_limit is {limits}; allowed: least and most")
    least, most = limits
    model = {
        "name": "mamba2",
        **model_keywords(hf, OWN_FIELDS),
        "tie_embeddings": optional(hf, "tie_word_embeddings", bool, False),
        "pattern": ["mamba2"],
        "dense_layers": 0,
        **MODEL_FIXED,
    }
    mixer = {
        "_target_": target(Mamba2),
        "_partial_": True,
        **keywords(hf, MIXER_FIELDS, Mamba2),
        "step_min": least,
        "step_max": None if most in (INFINITY, math.inf) else most,
        "norm_eps": field(hf, "layer_norm_epsilon", float),
    }
    return {
        "model": model,
        "mixer": {"mamba2": mixer},
        "tokens": {ours: hf.get(theirs) for ours, theirs in TOKEN_FIELDS.items()},
    }
