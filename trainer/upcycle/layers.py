"""Which layers a recipe names, and what the mixers of the new model are called."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from models.checkpoints.config import Config, layer_mixers, shortest_pattern

Layers = Literal["all"] | Sequence[int]


def choose(key: str, layers: Layers, allowed: Sequence[int]) -> Sequence[int]:
    """Raises ValueError for a layer that is not among the allowed ones."""
    if layers == "all":
        return allowed
    wrong = [layer for layer in layers if layer not in allowed]
    if wrong:
        raise ValueError(f"{key} has {wrong[0]}; allowed: {', '.join(map(str, allowed))}")
    return [int(layer) for layer in layers]


def check_named(key: str, layers: Sequence[int] | None, selection: str | None) -> None:
    """Raises ValueError unless either a list or a file names the layers."""
    if (layers is None) == (selection is None):
        raise ValueError(
            f"{key} is {layers} and selection is {selection}; allowed: one of them, the other null"
        )


def named(layers: Sequence[int] | None, selection: str | None) -> Sequence[int]:
    """The list, or what the layer selection wrote. Raises ValueError for another file."""
    if layers is not None:
        return layers
    try:
        return [int(layer) for layer in json.loads(Path(str(selection)).read_text())["layers"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"selection is {selection}; it holds no layers: {error}") from None


def new_config(config: Config, made: Mapping[int, tuple[str, Config]]) -> Config:
    """With other mixers in the layers of `made`, by name and section. Where layers of one name
    differ, each gets a name like mla_07."""
    layers, sections = layer_mixers(config["model"]), config["mixer"]
    kept = {name: sections[name] for i, name in enumerate(layers) if i not in made}
    names = list(layers)
    for name in dict.fromkeys(name for name, _ in made.values()):
        own = {layer: section for layer, (other, section) in made.items() if other == name}
        first = next(iter(own.values()))
        alike = all(section == first for section in (*own.values(), kept.get(name, first)))
        for layer in own:
            names[layer] = name if alike else f"{name}_{layer:02}"
    new = {names[layer]: section for layer, (_, section) in made.items()}
    model = config["model"] | {"pattern": shortest_pattern(names)}
    return config | {"model": model, "mixer": kept | new}
