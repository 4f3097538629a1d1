"""Upcycling: attention of a trained model becomes latent attention or a linear mixer.

The source is read, converted and written layer by layer: in memory are one layer and the hidden
states of the calibration rows.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from models.checkpoints.shards import write_shards
from parallel.mesh import join
from trainer.checkpoint.convert import DTYPES, Dtype, cast, copy_tokenizer, new_folder, shard_bytes
from trainer.checkpoint.weights import WeightSource, open_weights
from trainer.construct import construct
from trainer.errors import naming
from trainer.load import tokenizer_of
from trainer.upcycle.assembly import Assemble, Assembly
from trainer.upcycle.calibration import calibration
from trainer.upcycle.conversion import Conversion
from trainer.upcycle.recipe import Recipe
from trainer.upcycle.report import table
from trainer.upcycle.teacher import Teacher

log = logging.getLogger(__name__)


def upcycle(
    *,
    source: str,
    target: str,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    dtype: Dtype | None = None,
    max_shard_gb: float = 5,
) -> Path:
    """Writes the native folder `target`, which must not exist, and in it report.json, what each
    step of a conversion changed; it appears when it is complete.

    source: see `convert`; recipe and data: sections of the configuration. Raises ConfigError.
    """
    made: Recipe | Assemble = construct(recipe, "recipe")
    with naming("source", source):
        weights = open_weights(Path(source))
    largest = shard_bytes(max_shard_gb)
    with new_folder(target) as folder:
        if isinstance(made, Assemble):
            built: Assembly | Conversion = Assembly(weights, made)
        else:
            if made.calibration_tokens and data["tokenizer"] is None:
                data = {**data, "tokenizer": tokenizer_of("source", source)}
            built = build_conversion(weights, made, data)
        kept = dtype and DTYPES[dtype]
        tensors = ((name, cast(name, tensor, kept)) for name, tensor in built.tensors())
        write_shards(folder, tensors, max_bytes=largest)
        (folder / "config.yaml").write_text(yaml.safe_dump(built.config(), sort_keys=False))
        copy_tokenizer(weights.tokenizer or source, folder)
        if isinstance(built, Conversion):
            report = {"source": source, "recipe": dict(recipe), **built.report()}
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
            for line in table(built.layers):
                log.info(line)
    return Path(target)


def build_conversion(weights: WeightSource, recipe: Recipe, data: Mapping[str, Any]) -> Conversion:
    """data: the section, with the tokenizer of the source where it is read."""
    batches = calibration(data, recipe, weights.config["model"])
    torch.manual_seed(recipe.seed)
    return Conversion(weights, recipe, Teacher(weights, batches, device=join().device))
