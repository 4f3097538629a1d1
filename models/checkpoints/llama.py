"""Llama, Qwen2 and Qwen3 in the form Hugging Face has them: names, shapes and config.json.

Transformers of grouped-query attention and dense feed-forward layers. Llama (arXiv 2407.21783) may
have biases on all four projections of attention, Qwen2 (arXiv 2407.10671) has them on queries, keys
and values, Qwen3 (arXiv 2505.09388) normalises the queries and keys of each head.
"""

import re
from dataclasses import dataclass

from models.checkpoints.config import (
    MODEL_FIELDS,
    TOKEN_FIELDS,
    Config,
    check_fields,
    check_model,
    field,
    layer_mixers,
    model_keywords,
    optional,
    shared_keywords,
    size,
    target,
)
from models.checkpoints.rope import export_rope, import_rope
from models.checkpoints.table import KeyTable, same, stack, swiglu
from models.mixers.gqa import GroupedQueryAttention
from models.rope import ROPE_KEYS

GQA_FIELDS = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
BIASES = ("qkv_bias", "out_bias")
# The one value that HybridLM computes; written, and demanded where it stands.
FIXED: Config = {"hidden_act": "silu", "attention_dropout": 0.0}
MODEL_FIXED: Config = {"residual_block": None}
FULL = "full_attention"  # no sliding windows
SCALED_LENGTH = "original_max_position_embeddings"
LENGTH = 2**17  # tokens that config.json promises where nothing is known; the model has no length

# What old checkpoints hold beside the weights.
_FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """One family. biases: what qkv_bias and out_bias may be; two values: as attention_bias says.

    head_dim: that of a config.json which has none, None for hidden_size / num_attention_heads.
    """

    name: str
    architecture: str
    biases: tuple[tuple[bool, bool], ...]
    qk_norm: bool
    fixed: Config
    head_dim: int | None = None

    def canonical_name(self, name: str, config: Config) -> str | None:
        """None for frequencies, and for the second copy of tied embeddings."""
        if _FREQUENCIES.search(name):
            return None
        if name == "lm_head.weight" and config["model"]["tie_embeddings"]:
            return None
        return name

    def key_table(self, config: Config) -> KeyTable:
        """Our tensors and where the published ones lie in them.

        Raises ValueError for a model that this family cannot hold.
        """
        model, gqa = config["model"], self._mixer(config)
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
                **_attention(f"{theirs}.self_attn", d_model, gqa),
                **swiglu("ffn", f"{theirs}.mlp", d_model, model["ffn"]["hidden"]),
            }
            table |= {f"layers.{i}.{name}": entry for name, entry in layer.items()}
        return table

    def export_config(self, config: Config) -> Config:
        """config.json for our `model`, `mixer` and, where known, `tokens`.

        Raises ValueError for a model that this family cannot hold.
        """
        model, tokens = config["model"], config.get("tokens", {})
        gqa = self._mixer(config)
        rope = export_rope(gqa)
        scaling = gqa["rope_scaling"] or {"factor": 1, SCALED_LENGTH: LENGTH}
        hf: Config = {
            "architectures": [self.architecture],
            "model_type": self.name,
            **FIXED,
            **self.fixed,
            **{theirs: model[ours] for ours, theirs in MODEL_FIELDS.items()},
            **{theirs: gqa[ours] for ours, theirs in GQA_FIELDS.items()},
            **{theirs: tokens.get(ours) for ours, theirs in TOKEN_FIELDS.items()},
            **rope,
            "intermediate_size": model["ffn"]["hidden"],
            "max_position_embeddings": tokens.get("length")
            or int(scaling["factor"] * scaling[SCALED_LENGTH]),
            "tie_word_embeddings": model["tie_embeddings"],
        }
        if len(self.biases) > 1:
            hf["attention_bias"] = gqa["qkv_bias"]
        return hf

    def import_config(self, hf: Config) -> Config:
        """Our `model`, `mixer` and `tokens` for a config.json.

        Raises ValueError for a missing field, and for a value that HybridLM does not compute.
        """
        check_fields(hf, FIXED | self.fixed)
        if any(kind != FULL for kind in optional(hf, "layer_types", list, [])):
            raise ValueError(f"config.json: layer_types is {hf['layer_types']}; allowed: {FULL}")
        tokens = {ours: hf.get(theirs) for ours, theirs in TOKEN_FIELDS.items()}
        return {
            "model": {
                "name": self.name,
                **model_keywords(hf),
                "pattern": ["gqa"],
                "ffn": {"hidden": field(hf, "intermediate_size")},
                "moe": None,
                "dense_layers": 0,
                "tie_embeddings": optional(hf, "tie_word_embeddings", bool, False),
                **MODEL_FIXED,
            },
            "mixer": {"gqa": self._import_mixer(hf)},
            "tokens": tokens | {"length": optional(hf, "max_position_embeddings")},
        }

    def _import_mixer(self, hf: Config) -> Config:
        heads = size(hf, "num_attention_heads")
        biased = optional(hf, "attention_bias", bool, False)
        if biased and len(self.biases) == 1:
            raise ValueError(
                f"config.json: attention_bias is True; {self.name} has biases on queries, keys and "
                "values alone; allowed: False"
            )
        qkv_bias, out_bias = self.biases[biased]
        head_dim = optional(hf, "head_dim", default=self.head_dim)
        return {
            "_target_": target(GroupedQueryAttention),
            "_partial_": True,
            "num_heads": heads,
            "num_kv_heads": optional(hf, "num_key_value_heads", default=heads),
            "head_dim": field(hf, "hidden_size") // heads if head_dim is None else head_dim,
            **import_rope(hf),
            "qkv_bias": qkv_bias,
            "out_bias": out_bias,
            "qk_norm": self.qk_norm,
            "output_gate": False,
            "norm_eps": field(hf, "rms_norm_eps", float),
        }

    def _mixer(self, config: Config) -> Config:
        """The keywords of the one mixer."""
        model = config["model"]
        check_model(model, MODEL_FIXED, family=self.name)
        if model["ffn"] is None or (
            model["moe"] is not None and model["dense_layers"] < model["num_layers"]
        ):
            raise ValueError(f"model.moe or model.ffn: {self.name} has only dense feed-forwards")
        names, gqa = shared_keywords(
            config,
            GroupedQueryAttention,
            held=[*GQA_FIELDS, *ROPE_KEYS, *BIASES],
            fixed={"qk_norm": self.qk_norm, "norm_eps": model["norm_eps"]},
        )
        for name in set(layer_mixers(model)) - names:
            raise ValueError(
                f"mixer.{name} is {config['mixer'][name]['_target_']}; {self.name} has only "
                "grouped-query attention"
            )
        biases = tuple(gqa[key] for key in BIASES)
        if biases not in self.biases:
            raise ValueError(
                f"qkv_bias and out_bias of the mixers are {biases}; {self.name} has only "
                f"{' or '.join(map(str, self.biases))}"
            )
        if model["d_model"] % gqa["num_heads"]:
            raise ValueError(
                f"model.d_model is {model['d_model']}; {self.name} needs a multiple of the heads"
            )
        return gqa


def _attention(theirs: str, d_model: int, gqa: Config) -> KeyTable:
    dim = gqa["head_dim"]
    heights = dict(
        zip("qkv", (gqa[f"num_{x}heads"] * dim for x in ("", "kv_", "kv_")), strict=True)
    )
    inner = heights["q"]

    def projections(kind: str, width: tuple[int, ...]) -> KeyTable:
        by_name = {f"{theirs}.{x}_proj.{kind}": height for x, height in heights.items()}
        return {f"mixer.qkv_proj.{kind}": stack(by_name, width)}

    table = projections("weight", (d_model,))
    table["mixer.out_proj.weight"] = same(f"{theirs}.o_proj.weight", (d_model, inner))
    if gqa["qkv_bias"]:
        table |= projections("bias", ())
    if gqa["out_bias"]:
        table["mixer.out_proj.bias"] = same(f"{theirs}.o_proj.bias", (d_model,))
    if gqa["qk_norm"]:
        table |= {f"mixer.{x}_norm.weight": same(f"{theirs}.{x}_norm.weight", (dim,)) for x in "qk"}
    return table


OPTIONAL = ((False, False), (True, True))
LLAMA = Decoder(
    name="llama",
    architecture="LlamaForCausalLM",
    biases=OPTIONAL,
    qk_norm=False,
    fixed={"mlp_bias": False},
)
QWEN2 = Decoder(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    biases=((True, False),),
    qk_norm=False,
    fixed={"use_sliding_window": False},
)
QWEN3 = Decoder(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    biases=OPTIONAL,
    qk_norm=True,
    fixed={"use_sliding_window": False},
    head_dim=128,
)
