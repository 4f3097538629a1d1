"""Replaces `auto` in the section `parallel`, before the process groups are made."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from models.mixer import Mixer
from models.ops.select import Ops
from models.sequence import SequenceInfo
from parallel.auto import Setting, decide
from parallel.mesh import world
from parallel.shapes import Shape, record_shapes
from trainer.construct import call, construct
from trainer.errors import ConfigError
from trainer.settings import Numerics, Settings

Config = Mapping[str, Any]
CHOSEN = ("ulysses", "softmax", "latent", "recurrence", "outer")


def resolve_parallel(config: Config) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section `parallel` without `auto`, and why it is so, in lines for the log.

    Every rank finds the same. Raises ConfigError.
    """
    section = dict(config["parallel"])
    left = [key for key in CHOSEN if section.get(key) == "auto"]
    if not left:
        return section, ()
