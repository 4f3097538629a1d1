"""A model, its configuration and the name of its tokenizer, from any folder with weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.hybrid import HybridLM
from models.ops.select import Ops
from trainer.build import build_model
from trainer.checkpoint.weights import load_weights, open_weights
from trainer.data.tokenizer import is_tokenizer
from trainer.errors import ConfigError, naming


def load_model(
    checkpoint: str, *, ops: Ops, device: torch.device, dtype: torch.dtype, vocab_size: int
) -> HybridLM:
    """The model, ready for inference; vocab_size: the tokenizer's, which it must hold.

    checkpoint: a checkpoint, a run folder, a native or a Hugging Face folder. Raises ConfigError.
    """
    path = Path(checkpoint)
    with naming("checkpoint", checkpoint):
        sections = open_weights(path).config
    model = build_model(sections["model"], sections["mixer"], vocab_size=vocab_size, ops=ops)
    model.to(dtype).to_empty(device=device)
    with naming("checkpoint", checkpoint):
        load_weights(model, path)
    return model.eval().requires_grad_(False)


def tokenizer_of(key: str, folder: str, *, other: str = "data.tokenizer") -> str:
    """The name of the tokenizer that belongs to the weights in a folder; see `load_model`.

    key: of the configuration, that names the folder; other: that would name a tokenizer. Raises
    ConfigError if there is none.
    """
    with naming(key, folder):
        name = open_weights(Path(folder)).tokenizer
        if name is not None and is_tokenizer(name):
            return name
        lacking = "no tokenizer.json beside the weights"
        if name is not None:
            lacking = f"its tokenizer {name} is not there"
        raise ConfigError(f"{lacking}; allowed: {other}=PATH of it, or {other}=bytes")


def take_model(config: Mapping[str, Any], *, tokenizer_given: bool) -> dict[str, Any]:
    """The configuration; with model=init_from, `model`, `mixer` and `tokens` are those of that
    folder, and its tokenizer is the data's unless that was given. Raises ConfigError.
    """
    if config["model"] != "init_from":
        return dict(config)
    folder = config["init_from"]
    if folder is None:
        raise ConfigError("init_from=null: model=init_from needs a folder with weights")
    with naming("init_from", folder):
        sections = open_weights(Path(folder)).config
    taken = {key: sections[key] for key in ("model", "mixer", "tokens")}
    if not tokenizer_given:
        taken["data"] = config["data"] | {"tokenizer": tokenizer_of("init_from", folder)}
    return {**config, **taken}
