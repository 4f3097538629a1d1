"""Published model families by the model_type of their config.json."""

from pathlib import Path
from typing import Protocol

from models.checkpoints import deepseek_v3, kimi_linear, longhaul, mamba2
from models.checkpoints.config import Config
from models.checkpoints.llama import LLAMA, QWEN2, QWEN3
from models.checkpoints.table import KeyTable


class Family(Protocol):
    """See `kimi_linear.py`, a module, and `llama.py`, an object for each of three alike."""

    def canonical_name(self, name: str, config: Config) -> str | None: ...
    def key_table(self, config: Config) -> KeyTable: ...
    def export_config(self, config: Config) -> Config: ...
    def import_config(self, hf: Config) -> Config: ...


FAMILIES: dict[str, Family] = {
    "kimi_linear": kimi_linear,
    "deepseek_v3": deepseek_v3,
    "llama": LLAMA,
    "mamba2": mamba2,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    longhaul.MODEL_TYPE: longhaul,  # the last, since it holds any model
}


def family_of(hf: Config, *, source: Path) -> Family:
    """The family of a config.json. Raises ValueError for one that is not known."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{source}: model_type is {model_type!r}; known are {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def family_for(config: Config) -> Family:
    """The first family that can hold a model of ours. Raises ValueError where none can."""
    reason = ""
    for family in FAMILIES.values():
        try:
            family.key_table(config)
            family.export_config(config)
        except ValueError as error:
            reason = str(error)
        else:
            return family
    raise ValueError(reason)
