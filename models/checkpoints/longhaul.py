"""A model of ours that no published family holds: our names below `model.`, our two sections.

The folder has the code to run it, so that transformers needs no Longhaul; see `models.portable`.
"""

import importlib
from functools import cache

import torch

from models.checkpoints.config import TOKEN_FIELDS, Config, field
from models.checkpoints.table import KeyTable, same
from models.mixer import Mixer
from models.ops.select import Ops
from models.portable.build import build
from models.portable.code import AUTO_MAP

MODEL_TYPE = "longhaul"
_MIXERS = "models.mixers."


def canonical_name(name: str, config: Config) -> str | None:
    return name


def key_table(config: Config) -> KeyTable:
    """Raises ValueError for a configuration that makes no model."""
    classes = {target: _locate(target) for target in mixer_targets(config)}
    with torch.device("meta"):
        model = build(config["model"], config["mixer"], classes=classes, ops=Ops())
    return {name: same(f"model.{name}", tuple(x.shape)) for name, x in model.state_dict().items()}


def mixer_targets(config: Config) -> list[str]:
    """Raises ValueError for anything but the name of a class in `models.mixers`."""
    sections = [field(config["mixer"], name, dict) for name in config["mixer"]]
    targets = [str(section.get("_target_")) for section in sections]
    for target in targets:
        if not target.startswith(_MIXERS):
            raise ValueError(f"config.json: {target} is no mixer; allowed: {_MIXERS}*")
    return targets


@cache
def _locate(target: str) -> type[Mixer]:
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"config.json: no mixer {target} ({error})") from error


def export_config(config: Config) -> Config:
    """config.json for our `model`, `mixer` and, where known, `tokens`."""
    tokens = config.get("tokens", {})
    return {
        "architectures": ["LonghaulForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": AUTO_MAP,
        "model": config["model"],
        "mixer": config["mixer"],
        **{theirs: tokens.get(ours) for ours, theirs in TOKEN_FIELDS.items()},
        "tie_word_embeddings": False,  # the model itself has one tensor for both, or two
    }


def import_config(hf: Config) -> Config:
    """Raises ValueError for a missing field."""
    config = {key: field(hf, key, dict) for key in ("model", "mixer")}
    mixer_targets(config)
    return config | {"tokens": {ours: hf.get(theirs) for ours, theirs in TOKEN_FIELDS.items()}}
