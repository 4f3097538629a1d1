"""Kimi Linear in the form Hugging Face has it: names, shapes and config.json.

arXiv 2510.26692; the released model is moonshotai/Kimi-Linear-48B-A3B. Dense feed-forward layers
are `mlp.*` there and `block_sparse_moe.*` in what transformers saves; both are read, the former
is written.
"""

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
    shortest_pattern,
    target,
)
from models.checkpoints.mla import MLA_FIELDS, mla_table
from models.checkpoints.table import Entry, KeyTable, Part, rows, same, swiglu
from models.mixers.kda import KimiDeltaAttention
from models.mixers.mla import MultiHeadLatentAttention
from models.moe import MoE

# Our keyword -> field of config.json, beside those of all families.
KDA_FIELDS = {  # of linear_attn_config
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "conv_width": "short_conv_kernel_size",
}
KDA_OUTSIDE = {
    "num_heads": "linear_num_heads",
    "head_dim": "linear_head_dim",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
MOE_FIELDS = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_token",
    "hidden": "moe_intermediate_size",
    "routed_scaling": "routed_scaling_factor",
}

# What transformers calls fields of the released config.json.
RENAMED = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
}
# The one value that HybridLM computes; written, and demanded where it stands.
FIXED: Config = {
    "hidden_act": "silu",
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,  # transformers has the field and never ties
    "topk_group": 1,
}
# Fields of relatives under the same model_type, Kimi K3 among them.
ABSENT: Config = {
    "attention_bias": False,
    "attention_dropout": 0,
    "attn_res_block_size": None,
    "gate_lower_bound": None,
    "mla_use_output_gate": False,
    "routed_expert_hidden_size": None,
}
LENGTH = 2**20  # tokens that the released model promises; nothing in the model has a length
MODEL_FIXED: Config = {"tie_embeddings": False, "residual_block": None}
KDA_FIXED: Config = {"gate_lower_bound": None, "full_rank_gate": False}
MLA_FIXED: Config = {
    "num_kv_heads": None,
    "latent_norm": True,
    "bias": False,
    "scale": None,
    "rope_base": None,
    "rope_factor": 1.0,
    "rope_scaling": None,
    "rope_frequencies": None,
    "output_gate": False,
    "norm_eps": 1e-6,
}

_DENSE = re.compile(r"\.block_sparse_moe\.((?:gate|up|down)_proj)\.")


def canonical_name(name: str, config: Config) -> str | None:
    """The released name of a tensor that was found under `name`."""
    return _DENSE.sub(r".mlp.\1.", name)


def key_table(config: Config) -> KeyTable:
    """Our tensors and where the published ones lie in them.

    Raises ValueError for a model that this family cannot hold.
    """
    model = config["model"]
    kinds, kda, mla = _mixers(config)
    d_model, vocab = model["d_model"], model["vocab_size"]
    table = {
        "embed.weight": same("model.embed_tokens.weight", (vocab, d_model)),
        "norm.weight": same("model.norm.weight", (d_model,)),
        "head.weight": same("lm_head.weight", (vocab, d_model)),
    }
    for i, kind in enumerate(kinds):
        theirs = f"model.layers.{i}"
        attention = f"{theirs}.self_attn"
        layer = {
            "mixer_norm.weight": same(f"{theirs}.input_layernorm.weight", (d_model,)),
            "ffn_norm.weight": same(f"{theirs}.post_attention_layernorm.weight", (d_model,)),
            **(
                _kda(attention, d_model, kda)
                if kind == "kda"
                else mla_table(attention, d_model, mla, interleaved=False)
            ),
        }
        if i < _dense_layers(model):
            layer |= swiglu("ffn", f"{theirs}.mlp", d_model, model["ffn"]["hidden"])
        else:
            layer |= _moe(f"{theirs}.block_sparse_moe", d_model, model["moe"])
        table |= {f"layers.{i}.{name}": entry for name, entry in layer.items()}
    return table


def _kda(theirs: str, d_model: int, kda: Config) -> KeyTable:
    heads, dim, width = kda["num_heads"], kda["head_dim"], kda["conv_width"]
    inner = heads * dim
    return {
        "mixer.qkv_proj.weight": rows(
            [f"{theirs}.{x}_proj.weight" for x in "qkv"], (3 * inner, d_model)
        ),
        "mixer.conv_weight": rows(
            [f"{theirs}.{x}_conv1d.weight" for x in "qkv"],
            (3 * inner, width),
            published=(inner, 1, width),
        ),
        "mixer.decay.down.weight": same(f"{theirs}.f_a_proj.weight", (dim, d_model)),
        "mixer.decay.up.weight": same(f"{theirs}.f_b_proj.weight", (inner, dim)),
        "mixer.decay.gate.log_rate": same(f"{theirs}.A_log", (heads,), published=(1, 1, heads, 1)),
        "mixer.decay.gate.bias": same(f"{theirs}.dt_bias", (inner,)),
        "mixer.beta_proj.weight": same(f"{theirs}.b_proj.weight", (heads, d_model)),
        "mixer.gate_down.weight": same(f"{theirs}.g_a_proj.weight", (dim, d_model)),
        "mixer.gate_up.weight": same(f"{theirs}.g_b_proj.weight", (inner, dim)),
        "mixer.out_norm.weight": same(f"{theirs}.o_norm.weight", (dim,)),
        "mixer.out_proj.weight": same(f"{theirs}.o_proj.weight", (d_model, inner)),
    }


def _moe(theirs: str, d_model: int, moe: Config) -> KeyTable:
    experts, hidden = moe["num_experts"], moe["hidden"]
    up, down = (hidden, d_model), (d_model, hidden)
    gate_up = [
        Part(f"{theirs}.experts.{e}.{name}.weight", up, (e, half))
        for e in range(experts)
        for name, half in (("w1", slice(0, hidden)), ("w3", slice(hidden, 2 * hidden)))
    ]
    downs = [Part(f"{theirs}.experts.{e}.w2.weight", down, (e,)) for e in range(experts)]
    return {
        "ffn.router.weight": same(f"{theirs}.gate.weight", (experts, d_model)),
        "ffn.router.bias": same(f"{theirs}.gate.e_score_correction_bias", (experts,)),
        "ffn.experts.gate_up": Entry((experts, 2 * hidden, d_model), tuple(gate_up)),
        "ffn.experts.down": Entry((experts, *down), tuple(downs)),
        **swiglu("ffn.shared", f"{theirs}.shared_experts", d_model, moe["shared_hidden"]),
    }


def export_config(config: Config) -> Config:
    """config.json for our `model`, `mixer` and, where known, `tokens`.

    Raises ValueError for a model that this family cannot hold.
    """
    model, tokens = config["model"], config.get("tokens", {})
    kinds, kda, mla = _mixers(config)
    hf: Config = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        **FIXED,
        **{theirs: model[ours] for ours, theirs in MODEL_FIELDS.items()},
        **{theirs: tokens.get(ours) for ours, theirs in TOKEN_FIELDS.items()},
        "intermediate_size": model["ffn"]["hidden"],
        "first_k_dense_replace": _dense_layers(model),
        "model_max_length": tokens.get("length") or LENGTH,
        "linear_attn_config": {
            "full_attn_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "mla"],
            "kda_layers": [i + 1 for i, kind in enumerate(kinds) if kind == "kda"],
            **{theirs: kda[ours] for ours, theirs in KDA_FIELDS.items() if kda},
        },
    }
    if mla:
        hf |= {theirs: mla[ours] for ours, theirs in MLA_FIELDS.items()}
        hf["num_key_value_heads"] = mla["num_heads"]
    if _dense_layers(model) < model["num_layers"]:
        moe = model["moe"]
        hf |= {theirs: moe[ours] for ours, theirs in MOE_FIELDS.items()}
        hf["num_shared_experts"] = moe["shared_hidden"] // moe["hidden"]
    return hf


def _mixers(config: Config) -> tuple[list[str], Config, Config]:
    """Per layer "kda" or "mla", and the keywords of each kind, empty where no layer has it."""
    model = config["model"]
    check_model(model, MODEL_FIXED, family="kimi_linear")
    _check_ffn(model)
    kda_fixed = KDA_FIXED | {"norm_eps": model["norm_eps"]}
    kda_names, kda = shared_keywords(config, KimiDeltaAttention, held=KDA_FIELDS, fixed=kda_fixed)
    mla_names, mla = shared_keywords(
        config, MultiHeadLatentAttention, held=MLA_FIELDS, fixed=MLA_FIXED
    )
    layers = layer_mixers(model)
    for name in set(layers) - kda_names - mla_names:
        raise ValueError(
            f"mixer.{name} is {config['mixer'][name]['_target_']}; kimi_linear has only KDA and MLA"
        )
    return ["kda" if name in kda_names else "mla" for name in layers], kda, mla


def _check_ffn(model: Config) -> None:
    moe = model["moe"]
    if model["ffn"] is None:
        raise ValueError("model.ffn is null; kimi_linear has a feed-forward in every layer")
    if _dense_layers(model) < model["num_layers"] and (
        moe["shared_hidden"] == 0 or moe["shared_hidden"] % moe["hidden"]
    ):
        raise ValueError(
            f"model.moe.shared_hidden is {moe['shared_hidden']}: kimi_linear needs a positive "
            f"multiple of model.moe.hidden = {moe['hidden']}"
        )


def _dense_layers(model: Config) -> int:
    layers = model["num_layers"]
    return layers if model["moe"] is None else min(model["dense_layers"], layers)


def import_config(hf: Config) -> Config:
    """Our `model`, `mixer` and `tokens` for a config.json.

    Raises ValueError for a missing field, and for a value that HybridLM does not compute.
    """
    hf = {RENAMED.get(name, name): value for name, value in hf.items()}
    check_fields(hf, FIXED | ABSENT)
    kinds = _layer_kinds(hf)
    model = {
        "name": "kimi_linear",
        **model_keywords(hf),
        "pattern": shortest_pattern(kinds),
        "ffn": {"hidden": field(hf, "intermediate_size")},
        **MODEL_FIXED,
    }
    dense = _leading_dense(hf)
    if dense < len(kinds):
        moe = keywords(hf, MOE_FIELDS, MoE)
        moe["shared_hidden"] = field(hf, "num_shared_experts") * moe["hidden"]
        model |= {"moe": moe, "dense_layers": dense}
    else:
        model |= {"moe": None, "dense_layers": 0}
    importers = {"kda": _import_kda, "mla": _import_mla}
    tokens = {ours: hf.get(theirs) for ours, theirs in TOKEN_FIELDS.items()}
    return {
        "model": model,
        "mixer": {kind: importers[kind](hf) for kind in dict.fromkeys(kinds)},
        "tokens": tokens | {"length": hf.get("model_max_length")},
    }


def _import_kda(hf: Config) -> Config:
    linear = optional(hf, "linear_attn_config", dict) or {
        theirs: field(hf, outside) for theirs, outside in KDA_OUTSIDE.items()
    }
    return {
        "_target_": target(KimiDeltaAttention),
        "_partial_": True,
        **keywords(linear, KDA_FIELDS, KimiDeltaAttention),
        **KDA_FIXED,
        "norm_eps": field(hf, "rms_norm_eps", float),
    }


def _import_mla(hf: Config) -> Config:
    heads = field(hf, "num_attention_heads")
    if optional(hf, "num_key_value_heads", default=heads) != heads:
        raise ValueError(
            f"config.json: num_key_value_heads is {hf['num_key_value_heads']}; "
            f"latent attention has num_attention_heads = {heads}"
        )
    return {
        "_target_": target(MultiHeadLatentAttention),
        "_partial_": True,
        **keywords(hf, MLA_FIELDS, MultiHeadLatentAttention),
        **MLA_FIXED,
    }


def _layer_kinds(hf: Config) -> list[str]:
    """Per layer "kda" or "mla", from transformers' list or from the released lists, 1-based."""
    layers = field(hf, "num_hidden_layers")
    given = optional(hf, "layer_types", list[str])
    if given is not None:
        names = {"linear_attention": "kda", "full_attention": "mla"}
        kinds = [names.get(kind) for kind in given]
        where = "layer_types"
    else:
        linear = field(hf, "linear_attn_config", dict)
        placed = dict.fromkeys(field(linear, "kda_layers", list[int]), "kda")
        placed |= dict.fromkeys(field(linear, "full_attn_layers", list[int]), "mla")
        kinds = [placed.get(i + 1) for i in range(max([layers, *placed]))]
        where = "linear_attn_config"
    if len(kinds) != layers or None in kinds:
        raise ValueError(f"config.json: {where} must give each of {layers} layers KDA or MLA")
    return [kind for kind in kinds if kind is not None]


def _leading_dense(hf: Config) -> int:
    """How many layers, the first ones, have a dense feed-forward."""
    kinds = optional(hf, "mlp_layer_types", list)
    if kinds is None:
        return field(hf, "first_k_dense_replace")
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (field(hf, "num_hidden_layers") - dense):
        raise ValueError(
            f"config.json: mlp_layer_types is {kinds}; one kind per layer, dense ones first"
        )
    return dense
