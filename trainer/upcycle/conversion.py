"""A model converted layer by layer: a stream of tensors, then its configuration and a report."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.config import Config, layer_mixers
from models.convert.converted import Converted
from models.convert.forms import Attention
from models.convert.measure import Row, errors
from models.convert.source import is_attention, read_attention
from models.mixer import Mixer
from models.precision import Island
from trainer.checkpoint.weights import WeightSource
from trainer.construct import construct
from trainer.errors import ConfigError
from trainer.upcycle.layers import new_config
from trainer.upcycle.recipe import Plan, Recipe
from trainer.upcycle.teacher import Observed, Teacher


class Conversion:
    """Of a source by a recipe. `config` and `report` hold behind the last tensor.

    Raises ConfigError, at once for layers that cannot be converted, else where it comes to them.
    """

    def __init__(self, weights: WeightSource, recipe: Recipe, teacher: Teacher) -> None:
        self.weights, self.teacher = weights, teacher
        self.sections = weights.config["mixer"]
        self.names = layer_mixers(weights.config["model"])
        self.plan = make_plan(self.names, self.sections, recipe)
        self.made: dict[int, tuple[str, Config]] = {}
        self.layers: list[dict[str, Any]] = []  # of the report

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By their names in the new model."""
        for name in self.weights.shapes:
            if not name.startswith("layers."):
                yield name, self.weights.get(name)
        for layer in range(len(self.names)):
            for name, tensor in self._layer(layer).items():
                yield f"layers.{layer}.{name}", tensor

    def config(self) -> Config:
        return new_config(self.weights.config, self.made)

    def report(self) -> dict[str, Any]:
        """JSON: tokens of the calibration rows, and for each layer the errors of its steps."""
        tokens = sum(int(info.valid.sum()) for info in self.teacher.infos)
        return {"tokens": tokens, "layers": self.layers}

    def _layer(self, layer: int) -> dict[str, Tensor]:
        prefix = f"layers.{layer}."
        own = {
            name.removeprefix(prefix): self.weights.get(name)
            for name in self.weights.shapes
            if name.startswith(prefix)
        }
        observed = self.teacher.observe(layer, own)
        if layer not in self.plan:
            return own
        old = {n.removeprefix("mixer."): x for n, x in own.items() if n.startswith("mixer.")}
        rest = {name: x for name, x in own.items() if not name.startswith("mixer.")}
        new = self._convert(layer, old, observed)
        return rest | {f"mixer.{name}": x for name, x in new.items()}

    def _convert(self, layer: int, old: Mapping[str, Tensor], seen: Observed) -> dict[str, Tensor]:
        name, convert = self.plan[layer]
        section = self.sections[self.names[layer]]
        old = {key: x.to(self.teacher.device) for key, x in old.items()}
        try:
            made = convert(section, old, seen.moment)
        except ValueError as error:
            raise ConfigError(f"recipe: layer {layer}: {error}") from error
        mixer = self._build(made)
        dtype = old["qkv_proj.weight"].dtype
        stored = {key: x.to(_dtype(key, mixer, dtype)) for key, x in mixer.state_dict().items()}
        self.made[layer] = name, made.section
        self.layers.append(
            {
                "layer": layer,
                "mixer": name,
                "steps": step_errors(read_attention(section, old), made, seen),
                "outputs": output_error(mixer.to(self.teacher.dtype), seen),
                "dropped": list(made.dropped),
            }
        )
        return stored

    def _build(self, made: Converted) -> Mixer:
        """In fp64, with initial values where the conversion gives none."""
        d_model = self.weights.config["model"]["d_model"]
        with torch.device(self.teacher.device):
            mixer: Mixer = construct(made.section, "mixer", ops=self.teacher.ops)(d_model)
        with torch.no_grad():
            self.teacher.model.reset_unit(mixer)
            made.fill(mixer.double())
        return mixer


def make_plan(layers: Sequence[str], sections: Config, recipe: Recipe) -> Plan:
    """layers: the mixer's name of each."""
    attention = [i for i, name in enumerate(layers) if is_attention(sections[name])]
    if not attention:
        raise ConfigError(
            f"source: its mixers are {', '.join(dict.fromkeys(layers))}; allowed: a model with "
            "layers of grouped-query attention"
        )
    try:
        return recipe.plan(attention)
    except ValueError as error:
        raise ConfigError(f"recipe.{error}") from error


def step_errors(attention: Attention, made: Converted, seen: Observed) -> list[dict[str, Any]]:
    """Of the attention behind each step to that before all; without data no figures."""
    rows = [Row.of(x, info) for x, _, info in seen.rows]
    found = errors(attention, [stage.form for stage in made.stages], rows)
    return [
        {"step": stage.name, "exact": stage.exact, **(error._asdict() if rows else {})}
        for stage, error in zip(made.stages, found, strict=True)
    ]


@torch.no_grad()
def output_error(mixer: Mixer, seen: Observed) -> float | None:
    """Of the new mixer to the old one's outputs, as `Error.outputs`; None without data."""
    differences = total = 0.0
    for x, output, info in seen.rows:
        exact = output[info.valid].double()
        differences += (mixer(x, info)[info.valid].double() - exact).square().sum().item()
        total += exact.square().sum().item()
    return math.sqrt(differences / total) if seen.rows else None


def _dtype(name: str, mixer: Mixer, dtype: torch.dtype) -> torch.dtype:
    """That a tensor is stored in: decays and norms never below fp32."""
    module = mixer.get_submodule(name.rpartition(".")[0])
    return torch.promote_types(dtype, torch.float32) if isinstance(module, Island) else dtype
