"""Published model families by the model_type of their config.json."""

from pathlib import Path
from typing import Protocol

from models.checkpoints import kimi_linear
from models.checkpoints.config import Config
from models.checkpoints.table import KeyTable


class Family(Protocol):
    """One file per family: see `kimi_linear.py`."""

    def canonical_name(self, name: str) -> str: ...
    def key_table(self, config: Config) -> KeyTable: ...
    def export_config(self, config: Config) -> Config: ...
    def import_config(self, hf: Config) -> Config: ...


FAMILIES: dict[str, Family] = {"kimi_linear": kimi_linear}


def family_of(hf: Config, *, source: Path) -> Family:
    """The family of a config.json. Raises ValueError for one that is not known."""
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{source}: model_type is {model_type!r}; known are {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def family_for(config: Config) -> Family:
    """The first family that can hold a model of ours. Raises ValueError, saying why none can."""
    reasons = []
    for family in FAMILIES.values():
        try:
            family.export_config(config)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return family
    raise ValueError(f"no published family can hold this model: {'; '.join(reasons)}")
