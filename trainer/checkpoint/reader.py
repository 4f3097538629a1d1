"""Reading one checkpoint back, on any ranks and into any sharding."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from models.checkpoints.table import Shape, check_shapes
from trainer.checkpoint import random_state
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.shards import TensorReader
from trainer.engine import State
from trainer.errors import ConfigError

PROGRESS = "progress.json"
CONFIG = "config.yaml"


class CheckpointReader:
    """A checkpoint that was found whole. Each rank reads by itself; only `check` is collective."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self._ranks = path, ranks
        self._shards = TensorReader(path)

    @property
    def progress(self) -> dict[str, Any]:
        """What `CheckpointStore.save` was given."""
        return json.loads((self.path / PROGRESS).read_bytes())

    def check(self, state: State) -> None:
        """Raises ConfigError, on all ranks, if the checkpoint holds another model or optimiser.

        state: what `fill` will be given on this rank, in all; ranks may have different names.
        """
        own = {section: {n: tuple(x.shape) for n, x in v.items()} for section, v in state.items()}
        first = self._ranks.first(lambda: own)  # the same elsewhere, for most engines: sent once
        others = self._ranks.together(
            lambda: {s: dict(v.items() - first.get(s, {}).items()) for s, v in own.items()}
        )
        wanted = {section: dict(shapes) for section, shapes in first.items()}
        for other in others:
            for section, shapes in other.items():
                wanted.setdefault(section, {}).update(shapes)
        self._ranks.together(lambda: self._check(wanted))

    def fill(self, state: State) -> None:
        """Reads into the tensors of `state`, whole ones or shards, a part of the names or all."""
        dcp.load(state, storage_reader=self._shards, no_dist=True)

    def restore_generators(self) -> None:
        """This rank's random generators; where there were other ranks they stay as they are."""
        if read_manifest(self.path)["ranks"] == self._ranks.count:
            file = self.path / random_state.file_name(self._ranks.rank)
            random_state.restore(torch.load(file, weights_only=True))

    def _check(self, wanted: dict[str, dict[str, Shape]]) -> None:
        saved = self._shards.read_metadata().state_dict_metadata
        for section, expected in wanted.items():
            prefix = f"{section}."
            found = {
                name.removeprefix(prefix): tuple(getattr(entry, "size", ()))
                for name, entry in saved.items()
                if name.startswith(prefix)
            }
            fault = f"{self.path} is a checkpoint of another {section}"
            try:
                check_shapes(expected, found, fault=fault)
            except ValueError as error:
                raise ConfigError(str(error)) from None
