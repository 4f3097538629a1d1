"""Weights from wherever they are: a Hugging Face folder, a native folder, a checkpoint of ours.

A native folder is `config.yaml` (`model:`, `mixer:`, and `tokens:`, the ids of special tokens and
how many tokens a text may have), safetensors files under our names, and tokenizer files if there
are any.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from models.checkpoints.config import Config
from models.checkpoints.families import family_of
from models.checkpoints.shards import ShardReader, has_shards
from models.checkpoints.table import Shape, check_shapes, published_shapes
from models.hybrid import HybridLM
from trainer.checkpoint.manifest import MANIFEST, check_whole
from trainer.checkpoint.reader import PROGRESS
from trainer.checkpoint.shards import TensorReader
from trainer.checkpoint.store import CheckpointStore
from trainer.data.tokenizer import ByteTokenizer, build_tokenizer, is_tokenizer, padded
from trainer.errors import ConfigError


@dataclass(frozen=True)
class WeightSource:
    """A model's tensors under our names, each read when asked for."""

    config: Config  # `model`, `mixer` of the mixers in use, `tokens`
    shapes: dict[str, Shape]
    get: Callable[[str], Tensor]
    tokenizer: str | None  # as data.tokenizer names it; None: a folder that lacks one


def open_weights(path: Path) -> WeightSource:
    """Reads names, shapes and configuration.

    path: a folder with config.json or with config.yaml and safetensors files, a checkpoint, or a
    run folder, whose newest checkpoint is taken. Raises ConfigError, in one line naming the file,
    for anything missing, damaged or of an unknown family.
    """
    try:
        if (path / MANIFEST).exists():
            check_whole(path)
            return _open_checkpoint(path)
        if (path / "config.json").exists():
            return _open_hugging_face(path)
        if (path / "config.yaml").exists() and has_shards(path):
            return _open_native(path)
        if (path / "checkpoints").is_dir():
            newest = CheckpointStore(path / "checkpoints").resolve("auto")
            if newest is not None:
                return _open_checkpoint(newest)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    raise ConfigError(
        f"no weights in {path}; allowed: a Hugging Face folder (config.json), a native folder "
        f"(config.yaml, model.safetensors), a checkpoint ({MANIFEST}) or a run_dir with one"
    )


def load_weights(
    model: HybridLM, source: Path, *, assign: Callable[[str, Tensor], object] | None = None
) -> None:
    """Fills the model, tensor by tensor, keeping its dtypes and devices.

    assign: takes name and whole tensor in place of the model, which only tells the shapes then.
    Raises ConfigError, before anything is filled, if names or shapes differ.
    """
    weights = open_weights(source)
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if assign is None:
        assign = lambda name, value: state[name].copy_(value)  # noqa: E731
    try:
        fault = f"{source} holds another model than is configured (model=init_from takes its own)"
        check_shapes(expected, weights.shapes, fault=fault)
        with torch.no_grad():
            for name in expected:
                assign(name, weights.get(name))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _open_hugging_face(path: Path) -> WeightSource:
    hf = _parse(path / "config.json", json.loads)
    family = family_of(hf, source=path / "config.json")
    config = family.import_config(hf)
    table = family.key_table(config)
    shards = ShardReader(path)
    stored: dict[str, str] = {}
    for name in shards.shapes:
        canonical = family.canonical_name(name, config)
        if canonical in stored:
            raise ValueError(f"{path} holds one tensor twice, under two names")
        if canonical is not None:
            stored[canonical] = name
    found = {name: shards.shapes[stored[name]] for name in stored}
    check_shapes(published_shapes(table), found, fault=f"{path} does not fit its config.json")

    def get(name: str) -> Tensor:
        return table[name].join(lambda published: shards.get(stored[published]))

    shapes = {name: entry.shape for name, entry in table.items()}
    return WeightSource(config, shapes, get, _tokenizer_beside(path, shapes))


def _open_native(path: Path) -> WeightSource:
    shards = ShardReader(path)
    config = _read_config(path, shards.shapes)
    tokenizer = _tokenizer_beside(path, shards.shapes)
    return WeightSource(config, shards.shapes, shards.get, tokenizer)


def _open_checkpoint(path: Path) -> WeightSource:
    reader = TensorReader(path)
    prefix = "model."
    entries = {
        name.removeprefix(prefix): entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    shapes = {name: tuple(entry.size) for name, entry in entries.items()}
    config = _read_config(path, shapes)
    progress = _parse(path / PROGRESS, json.loads)
    _set_rope(config["mixer"], progress.get("rope", {}))
    tokenizer = _parse(path / "config.yaml", yaml.safe_load).get("data", {}).get("tokenizer")

    def get(name: str) -> Tensor:
        tensor = torch.empty(shapes[name], dtype=entries[name].properties.dtype)
        dcp.load({"model": {name: tensor}}, storage_reader=reader, no_dist=True)
        return tensor

    tokens = _token_ids(tokenizer, config["tokens"]) | {"length": _length(config, progress)}
    return WeightSource(config | {"tokens": tokens}, shapes, get, tokenizer)


def _read_config(folder: Path, shapes: dict[str, Shape]) -> Config:
    """`model` with its size of vocabulary, the mixers in use and, where given, `tokens`."""
    path = folder / "config.yaml"
    sections = _parse(path, yaml.safe_load)
    try:
        model = {**sections["model"], "vocab_size": shapes["embed.weight"][0]}
        model["pattern"] = model["pattern"][: model["num_layers"]]  # of a pattern, what is in use
        mixer = {name: sections["mixer"][name] for name in dict.fromkeys(model["pattern"])}
    except KeyError as error:
        raise ValueError(f"{folder} is not a model of ours: it lacks {error}") from None
    return {"model": model, "mixer": mixer, "tokens": sections.get("tokens", {})}


def _set_rope(mixers: Config, rope: Mapping[str, float | None]) -> None:
    """Rotary layers are as the stage of the checkpoint had them, whatever they started with."""
    for keys in mixers.values():
        if keys.get("rope_base") is not None:
            keys.update({f"rope_{key}": x for key, x in rope.items() if x is not None})


def _parse(path: Path, parse: Callable[[str], Any]) -> Config:
    try:
        parsed = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} must hold a mapping")
    return parsed


def _token_ids(tokenizer: str | None, before: Config) -> Config:
    """Ids that a config.json states: the tokenizer's, while it is there, and those stated `before`
    the run, in the weights that it began with, for what the tokenizer does not have."""
    try:
        built = build_tokenizer(str(tokenizer))
    except ConfigError:
        return before
    # transformers never trains the padding token: naming another role's token would freeze that.
    pad = None if built.pad_id == built.eos_id else built.pad_id
    ids: Config = {"bos": next(iter(built.start), None), "eos": built.eos_id, "pad": pad}
    ends = before.get("eos")
    if isinstance(ends, list) and built.eos_id in ends:  # a text may end in several ways
        ids["eos"] = ends
    return {role: before.get(role) if found is None else found for role, found in ids.items()}


def _length(config: Config, progress: Config) -> int | None:
    """Tokens that a config.json promises: as many as the weights did that the run began with, or
    its longest rows have, if those are more. For a model without such weights a rotary scaling
    tells how many it is made for."""
    scalings = filter(None, (keys.get("rope_scaling") for keys in config["mixer"].values()))
    made_for = (int(x["factor"] * x["original_max_position_embeddings"]) for x in scalings)
    stated = config["tokens"].get("length") or max(made_for, default=0)
    read = progress.get("stream", {}).get("made_of", {}).items()  # of stages that have begun
    return max([stated, *(x for key, x in read if key.endswith(".seq_len"))]) or None


def _tokenizer_beside(folder: Path, shapes: Mapping[str, Shape]) -> str | None:
    """`bytes` for weights without a tokenizer that have as many words as those have."""
    if is_tokenizer(str(folder)):
        return str(folder)
    return "bytes" if shapes["embed.weight"][0] == padded(ByteTokenizer.vocab_size) else None
