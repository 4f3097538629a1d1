"""Small models and mixers from the real configuration."""

import copy
import functools
from typing import TypeVar

import hydra
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from torch import nn

from models.hybrid import HybridLM
from models.mixer import Mixer
from models.ops.select import Ops
from trainer.build import build_model, build_ops
from trainer.construct import construct
from trainer.main import CONF, plain, register_groups

MIXERS = sorted(path.stem for path in (CONF / "mixer").glob("*.yaml"))
MODELS = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"init_from"})
M = TypeVar("M", bound=nn.Module)
OPS = (
    "softmax",
    "delta_rule",
    "decayed_sum",
    "routed_attention",
    "routed_delta_rule",
    "conv",
    "experts",
)
REFERENCE = Ops(**dict.fromkeys(OPS, "reference"))


def compose(overrides: list[str], command: str = "train") -> dict:
    """The resolved configuration of a command line, whose keys all exist."""
    choices = [word for word in overrides if (CONF / word.partition("=")[0]).is_dir()]
    values = [word for word in overrides if word not in choices]
    config = copy.deepcopy(composed(command, *choices))
    for override in map(parsed, values):
        key = override.key_or_group
        OmegaConf.update(config, key, override.value(), force_add=override.is_add())
    return plain(config)


@functools.cache
def parsed(override: str) -> Override:
    """Most of them come in many command lines, and Hydra takes longest to read them."""
    return OverridesParser.create().parse_override(override)


@functools.cache
def composed(command: str, *choices: str) -> DictConfig:
    """With groups chosen and no value changed, which takes Hydra a third of a second."""
    register_groups()
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        return hydra.compose(command, list(choices))


def make_model(overrides: list[str], *, device: str = "meta") -> HybridLM:
    """A model for the byte tokenizer, its parameters not initialised."""
    config = compose(overrides)
    ops = build_ops(config["ops"], "cpu")
    return build_model(config["model"], config["mixer"], vocab_size=320, ops=ops, device=device)


def make_mixer(name: str, ops: Ops | None = None, **keywords) -> Mixer:
    """The mixer of conf/mixer/<name>.yaml for d_model 24, in fp64, random in every parameter."""
    section = copy.deepcopy(mixer_sections()[name]) | keywords
    return randomise(construct(section, f"mixer.{name}")(24, ops=ops or Ops()).double())


@functools.cache
def mixer_sections() -> dict:
    return compose([])["mixer"]


def randomise(module: M) -> M:
    """Draws all parameters, also those that start as ones or zeros and so would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.copy_(noise * (0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5))
    return module
