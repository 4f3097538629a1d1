"""Two models of one source put together: some layers of one, everything else of the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.checkpoints.config import Config, layer_mixers
from trainer.checkpoint.weights import WeightSource, open_weights
from trainer.errors import ConfigError, naming
from trainer.upcycle.layers import check_named, choose, named, new_config


@dataclass(frozen=True, kw_only=True)
class Assemble:
    """other: where the layers come from that `layers` or the file of a layer selection names.

    Raises ValueError unless one of the two is given.
    """

    other: str
    layers: Sequence[int] | None
    selection: str | None

    def __post_init__(self) -> None:
        check_named("layers", self.layers, self.selection)


class Assembly:
    """Raises ConfigError for models that differ in more than their mixers."""

    def __init__(self, base: WeightSource, recipe: Assemble) -> None:
        self.base = base
        with naming("recipe.other", recipe.other):
            self.other = open_weights(Path(recipe.other))
            _check_alike(base.config["model"], self.other.config["model"])
        depth = range(base.config["model"]["num_layers"])
        try:
            self.layers = choose("layers", named(recipe.layers, recipe.selection), depth)
        except ValueError as error:
            raise ConfigError(f"recipe.{error}") from error

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By their names in the new model."""
        chosen = tuple(f"layers.{layer}." for layer in self.layers)
        for source, wanted in ((self.base, False), (self.other, True)):
            for name in source.shapes:
                if name.startswith(chosen) == wanted:
                    yield name, source.get(name)

    def config(self) -> Config:
        config = self.other.config
        names = layer_mixers(config["model"])
        made = {layer: (names[layer], config["mixer"][names[layer]]) for layer in self.layers}
        return new_config(self.base.config, made)


def _check_alike(base: Config, other: Config) -> None:
    for key in base:
        if key not in ("name", "pattern") and base[key] != other.get(key):
            raise ConfigError(f"its model.{key} is {other.get(key)}; allowed: {base[key]}")
