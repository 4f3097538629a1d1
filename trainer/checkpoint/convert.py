"""Weights from any of our sources into a Hugging Face folder or a native one."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import yaml
from torch import Tensor

from models.checkpoints import longhaul
from models.checkpoints.families import family_for
from models.checkpoints.shards import write_shards
from models.checkpoints.table import check_shapes
from models.portable.code import write_code
from trainer.checkpoint.weights import WeightSource, open_weights
from trainer.data.tokenizer import TOKENIZER, build_tokenizer
from trainer.errors import ConfigError, naming

Format = Literal["hf", "native"]
Dtype = Literal["bf16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Decays and the router's correction, which every published checkpoint keeps in fp32.
_ALWAYS_FP32 = (
    *(".decay.gate.log_rate", ".decay.gate.bias", ".router.bias"),
    *(".time_step.log_rate", ".time_step.bias", ".skip.weight"),
)
_TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def convert(
    *, source: str, target: str, format: Format, dtype: Dtype | None = None, max_shard_gb: float = 5
) -> Path:
    """Writes the folder `target`, which must not exist; it appears when it is complete.

    source: a Hugging Face or native folder, a checkpoint, or a run folder. dtype: of the weights;
    None keeps what the source has. max_shard_gb: size of a file, 10^9 bytes. In memory are at most
    two files' worth of tensors and the largest tensor, twice while it is cast. Raises ConfigError.
    """
    with new_folder(target) as folder:
        with naming("source", source):
            weights = open_weights(Path(source))
        write = _write_hugging_face if format == "hf" else _write_native
        try:
            write(
                weights, folder, dtype=dtype and DTYPES[dtype], max_bytes=shard_bytes(max_shard_gb)
            )
        except ValueError as error:
            raise ConfigError(f"source={source}: {error}") from None
        copy_tokenizer(weights.tokenizer or source, folder)
    return Path(target)


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[Path]:
    """A folder to write into, which gets the name `target` when all has gone well.

    Raises ConfigError if that exists.
    """
    path = Path(target)
    if path.exists():
        raise ConfigError(f"target={target}: exists already; allowed: a new folder")
    staging = path.parent / f".{path.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def shard_bytes(max_shard_gb: float) -> float:
    """Of a file. Raises ConfigError."""
    if max_shard_gb <= 0:
        raise ConfigError(f"max_shard_gb={max_shard_gb}: allowed: above 0")
    return max_shard_gb * 1e9


def _write_hugging_face(
    weights: WeightSource, folder: Path, *, dtype: torch.dtype | None, max_bytes: float
) -> None:
    family = family_for(weights.config)
    table = family.key_table(weights.config)
    expected = {name: entry.shape for name, entry in table.items()}
    check_shapes(expected, weights.shapes, fault="it does not hold what its configuration says")
    tensors = (
        part
        for name, entry in table.items()
        for part in entry.split(cast(name, weights.get(name), dtype))
    )
    write_shards(folder, tensors, max_bytes=max_bytes)
    stored = dtype or weights.get("norm.weight").dtype
    config = family.export_config(weights.config) | {"dtype": str(stored).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if family is longhaul:
        write_code(folder, mixers=longhaul.mixer_targets(weights.config))


def _write_native(
    weights: WeightSource, folder: Path, *, dtype: torch.dtype | None, max_bytes: float
) -> None:
    tensors = ((name, cast(name, weights.get(name), dtype)) for name in weights.shapes)
    write_shards(folder, tensors, max_bytes=max_bytes)
    (folder / "config.yaml").write_text(yaml.safe_dump(weights.config, sort_keys=False))


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """To be stored as `dtype`; None: as it is."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if name.endswith(_ALWAYS_FP32) else dtype)


def copy_tokenizer(name: str, target: Path) -> None:
    """All that describes a tokenizer lies beside its tokenizer.json; of a file of another name,
    beside which others may lie, goes what `build_tokenizer` reads.
    """
    place = Path(name).expanduser()
    if name == "bytes":
        return
    if place.is_file() and place.name != TOKENIZER:
        build_tokenizer(name).save(target)
        return
    for pattern in _TOKENIZER_FILES:
        for path in (place.parent if place.name == TOKENIZER else place).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
