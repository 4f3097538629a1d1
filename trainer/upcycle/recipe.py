"""Recipes: which layers of attention become what. The section `recipe` of conf/convert.yaml."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import Tensor

from models.checkpoints.config import Config
from models.convert.converted import Converted
from models.convert.gdn import to_gdn
from models.convert.kda import to_kda
from models.convert.latent import to_latent
from models.convert.linear import Taps
from models.convert.mamba2 import to_mamba2
from models.convert.options import LatentOptions
from trainer.upcycle.layers import Layers, check_named, choose, named

LINEAR: dict[str, Callable[..., Converted]] = {"kda": to_kda, "gdn": to_gdn, "mamba2": to_mamba2}

# Of a mixer's section, its tensors and the moment of its input, None without data.
Convert = Callable[[Config, Mapping[str, Tensor], Tensor | None], Converted]
Plan = dict[int, tuple[str, Convert]]  # by layer, with the new mixer's name


class Recipe(Protocol):
    """calibration_tokens: tokens of the data that conversions are measured on, and made by where
    reads_data; 0 for neither. seed: of initial values, where the source does not give them.
    """

    @property
    def calibration_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def reads_data(self) -> bool: ...

    def plan(self, attention: Sequence[int]) -> Plan:
        """attention: the layers that can be converted. Raises ValueError for others."""
        ...


@dataclass(frozen=True, kw_only=True)
class ToLatent(LatentOptions):
    """Multi-head latent attention in these layers."""

    layers: Layers
    calibration_tokens: int
    seed: int = 0

    def plan(self, attention: Sequence[int]) -> Plan:
        step = partial(_latent, options=self)
        return {layer: ("mla", step) for layer in choose("layers", self.layers, attention)}


@dataclass(frozen=True, kw_only=True)
class ToLinear:
    """A linear mixer in these layers."""

    mixer: Literal["kda", "gdn", "mamba2"]
    layers: Layers
    taps: Taps
    calibration_tokens: int
    seed: int = 0

    @property
    def reads_data(self) -> bool:
        return False

    def plan(self, attention: Sequence[int]) -> Plan:
        step = partial(_linear, mixer=self.mixer, taps=self.taps)
        return {layer: (self.mixer, step) for layer in choose("layers", self.layers, attention)}


@dataclass(frozen=True, kw_only=True)
class Hybrid(LatentOptions):
    """Latent attention in some of these layers, a list or a file that the layer selection wrote,
    and a linear mixer in the others."""

    layers: Layers
    mixer: Literal["kda", "gdn", "mamba2"]
    mla_layers: Sequence[int] | None
    selection: str | None
    taps: Taps
    calibration_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_named("mla_layers", self.mla_layers, self.selection)

    def plan(self, attention: Sequence[int]) -> Plan:
        layers = choose("layers", self.layers, attention)
        latent = choose("mla_layers", named(self.mla_layers, self.selection), layers)
        linear = partial(_linear, mixer=self.mixer, taps=self.taps)
        steps: Plan = {layer: (self.mixer, linear) for layer in layers}
        return steps | {layer: ("mla", partial(_latent, options=self)) for layer in latent}


def _latent(
    section: Config, tensors: Mapping[str, Tensor], moment: Tensor | None, *, options: LatentOptions
) -> Converted:
    return to_latent(section, tensors, moment, options)


def _linear(
    section: Config, tensors: Mapping[str, Tensor], moment: Tensor | None, *, mixer: str, taps: Taps
) -> Converted:
    return LINEAR[mixer](section, tensors, taps)
