"""Rotary settings as config.json has them: `rope_parameters`, and the older two fields."""

from typing import Any

from models.checkpoints.config import Config, field, optional
from models.rope_scaling import RULES, rule_keys

BASE = 10_000.0  # of a config.json that has none, for every family here


def import_rope(hf: Config) -> Config:
    """A mixer's keywords `rope_*`. Raises ValueError for a rule that `Rope` does not compute."""
    parameters = optional(hf, "rope_parameters", dict) or optional(hf, "rope_scaling", dict, {})
    kind = optional(parameters, "rope_type", str, optional(parameters, "type", str, "default"))
    base = optional(parameters, "rope_theta", float, optional(hf, "rope_theta", float, BASE))
    keywords: Config = {
        "rope_base": float(base),
        "rope_factor": 1.0,
        "rope_scaling": None,
        "rope_frequencies": None,
    }
    share = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"config.json: partial_rotary_factor is {share}; it must be 1")
    if kind == "linear":
        keywords["rope_factor"] = float(field(parameters, "factor", float))
    elif kind in RULES:
        keywords["rope_scaling"] = _import_scaling(kind, hf, parameters)
    elif kind != "default":
        raise ValueError(
            f"config.json: rope_type is {kind!r}; allowed: 'default', 'linear', 'llama3', 'yarn'"
        )
    return keywords


def _import_scaling(kind: str, hf: Config, parameters: Config) -> Config:
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            raise ValueError(f"config.json: {key} is {parameters[key]}; allowed: attention_factor")
    length = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    given = {key: value for key, value in (length | parameters).items() if value is not None}
    needed, optional = rule_keys(kind)
    keys = {key: field(given, key, float) for key in needed}
    return {"rope_type": kind, **keys, **{key: given[key] for key in optional if key in given}}


def export_rope(mixer: Config) -> Config:
    """The fields for a mixer's keywords, for transformers 5 and for what is older.

    Raises ValueError for a setting that they cannot tell.
    """
    base, factor, scaling = mixer["rope_base"], mixer["rope_factor"], mixer["rope_scaling"]
    if mixer["rope_frequencies"] is not None:
        raise ValueError("rope_frequencies are given; config.json has a field for the base only")
    if base is None:
        raise ValueError("rope_base is None; this model family has only rotary positions")
    rule: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        if factor != 1.0:
            raise ValueError(f"rope_factor is {factor}; beside rope_scaling it must be 1")
        rule = {"rope_type": "llama3", **scaling}
    elif factor != 1.0:
        rule = {"rope_type": "linear", "factor": factor}
    return {
        "rope_parameters": {**rule, "rope_theta": base},
        "rope_theta": base,
        "rope_scaling": None if rule["rope_type"] == "default" else rule,
    }
