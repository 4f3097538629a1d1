"""Hydra for many commands in one process: what it would read or compose again it does once."""

import copy

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.plugins.config_source import ConfigResult

_load = ConfigRepository.load_config
_loaded: dict[tuple, ConfigResult | None] = {}


def install() -> None:
    """For the rest of this process."""
    # It composes the whole configuration for hydra.mode, which no command line of a test has.
    Hydra.get_mode = lambda self, config_name, overrides: None
    ConfigRepository.load_config = load_config


def load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """Parsing a file takes longer than all that is done with it."""
    key = (config_path, *((source.provider, source.path) for source in self.sources))
    if key not in _loaded:
        _loaded[key] = _load(self, config_path)
    return copy.deepcopy(_loaded[key])
