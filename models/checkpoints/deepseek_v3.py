"""Latent attention with dense feed-forward layers in DeepSeek-V3's form (arXiv 2412.19437): what
TransMLA (arXiv 2502.07864) makes of other models, for engines that serve DeepSeek's.
"""

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
from models.checkpoints.llama import LENGTH, LLAMA
from models.checkpoints.mla import MLA_FIELDS, mla_table
from models.checkpoints.rope import export_rope, import_rope
from models.checkpoints.table import KeyTable, same, swiglu
from models.mixers.mla import MultiHeadLatentAttention
from models.rope import ROPE_KEYS

# The one value that HybridLM computes; written, and demanded where it stands.
FIXED: Config = {"hidden_act": "silu", "attention_dropout": 0.0, "rope_interleave": True}
MODEL_FIXED: Config = {"residual_block": None}
MLA_FIXED: Config = {"norm_eps": 1e-6}

canonical_name = LLAMA.canonical_name


def key_table(config: Config) -> KeyTable:
    """Our tensors and where the published ones lie in them.

    Raises ValueError for a model that this family cannot hold.
    """
    model, mla = config["model"], _mixer(config)
    d_model, vocab = model["d_model"], model["vocab_size"]
    table = {
        "embed.weight": same("model.embed_tokens.weight", (vocab, d_model)),
        "norm.weight": same("model.norm.weight", (d_model,)),
    }
    if not model["tie_embeddings"]:
        table["head.weight"] = same("lm_head.weight", (vocab, d_model))
    for i in range(model["num_layers"]):
        theirs = f"model.layers.{i}"
        layer = {
            "mixer_norm.weight": same(f"{theirs}.input_layernorm.weight", (d_model,)),
            "ffn_norm.weight": same(f"{theirs}.post_attention_layernorm.weight", (d_model,)),
            **mla_table(f"{theirs}.self_attn", d_model, mla, interleaved=True),
            **swiglu("ffn", f"{theirs}.mlp", d_model, model["ffn"]["hidden"]),
        }
        table |= {f"layers.{i}.{name}": entry for name, entry in layer.items()}
    return table


def export_config(config: Config) -> Config:
    """config.json for our `model`, `mixer` and, where known, `tokens`.

    Raises ValueError for a model that this family cannot hold.
    """
    model, tokens, mla = config["model"], config.get("tokens", {}), _mixer(config)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **FIXED,
        **{theirs: model[ours] for ours, theirs in MODEL_FIELDS.items()},
        **{theirs: mla[ours] for ours, theirs in MLA_FIELDS.items()},
        **{theirs: tokens.get(ours) for ours, theirs in TOKEN_FIELDS.items()},
        **export_rope(mla),
        "num_key_value_heads": mla["num_heads"],
        "attention_bias": mla["bias"],
        "intermediate_size": model["ffn"]["hidden"],
        "first_k_dense_replace": model["num_layers"],  # all: there are no experts
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": tokens.get("length") or LENGTH,
        "tie_word_embeddings": model["tie_embeddings"],
    }


def import_config(hf: Config) -> Config:
    """Our `model`, `mixer` and `tokens` for a config.json.

    Raises ValueError for a missing field, and for a value that HybridLM does not compute.
    """
    check_fields(hf, FIXED)
    heads, layers = field(hf, "num_attention_heads"), field(hf, "num_hidden_layers")
    if field(hf, "first_k_dense_replace") < layers:
        raise ValueError(
            f"config.json: first_k_dense_replace is {hf['first_k_dense_replace']}; it must be "
            f"num_hidden_layers = {layers}: only dense feed-forward layers are read"
        )
    if optional(hf, "num_key_value_heads", default=heads) != heads:
        raise ValueError(
            f"config.json: num_key_value_heads is {hf['num_key_value_heads']}; "
            f"latent attention has num_attention_heads = {heads}"
        )
    mla = {
        "_target_": target(MultiHeadLatentAttention),
        "_partial_": True,
        **keywords(hf, MLA_FIELDS, MultiHeadLatentAttention),
        **import_rope(hf),
        "bias": optional(hf, "attention_bias", bool, False),
        **MLA_FIXED,
    }
    tokens = {ours: hf.get(theirs) for ours, theirs in TOKEN_FIELDS.items()}
    return {
        "model": {
            "name": "deepseek_v3",
            **model_keywords(hf),
            "pattern": ["mla"],
            "ffn": {"hidden": field(hf, "intermediate_size")},
            "moe": None,
            "dense_layers": 0,
            "tie_embeddings": optional(hf, "tie_word_embeddings", bool, False),
            **MODEL_FIXED,
        },
        "mixer": {"mla": mla},
        "tokens": tokens | {"length": optional(hf, "max_position_embeddings")},
    }


def _mixer(config: Config) -> Config:
    """The keywords of the one mixer. Raises ValueError for another model."""
    model = config["model"]
    check_model(model, MODEL_FIXED, family="deepseek_v3")
    if model["ffn"] is None or (
        model["moe"] is not None and model["dense_layers"] < model["num_layers"]
    ):
        raise ValueError("model.moe or model.ffn: deepseek_v3 is read and written dense only")
    names, mla = shared_keywords(
        config, MultiHeadLatentAttention, held=[*MLA_FIELDS, *ROPE_KEYS, "bias"], fixed=MLA_FIXED
    )
    for name in set(layer_mixers(model)) - names:
        raise ValueError(
            f"mixer.{name} is {config['mixer'][name]['_target_']}; deepseek_v3 has only latent "
            "attention"
        )
    if mla["bias"] and mla["q_rank"] is None:
        raise ValueError("mixer bias is true and q_rank null; deepseek_v3 has none on such queries")
    if mla["nope_dim"] == 0:
        raise ValueError("mixer nope_dim is 0; deepseek_v3 has some")
    return mla
