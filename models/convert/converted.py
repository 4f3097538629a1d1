"""What a conversion of one layer's mixer gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from models.checkpoints.config import Config
from models.convert.forms import Decoupled


class Stage(NamedTuple):
    """The attention behind a step."""

    name: str
    exact: bool  # in exact arithmetic the step has changed nothing
    form: Decoupled


@dataclass(frozen=True, eq=False)
class Converted:
    """The new mixer's section of the config, and what gives it its values.

    fill: of a mixer of that section with initial values, which keeps them where the source has
    nothing to say.
    """

    section: Config
    fill: Callable[[Any], object]
    stages: tuple[Stage, ...] = ()
    dropped: tuple[str, ...] = ()  # what the source has and the new mixer has no place for
