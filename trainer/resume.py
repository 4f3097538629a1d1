"""What may change when a run goes on, and what may not.

Steps, engine, parallelism, micro-batches, optimiser settings, checkpoint, logging and evaluation
may. What decides the weights' shape or the stream of data may not. The data is compared by the
stream itself, which knows tokenizer and documents by content, wherever they lie: of its stages
those that have begun may not change, but for how long the one under way lasts; those to come may.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.config import defaults
from models.hybrid import HybridLM
from trainer.agreement import flatten
from trainer.construct import locate
from trainer.errors import ConfigError


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the first key that a resumed run may not change."""
    before, now = _identity(saved), _identity(current)
    # The model's own keys first: a changed pattern also changes which mixers there are to compare.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key[:6] != "model.", key)):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}={now.get(key)}: the checkpoint was written with {before.get(key)}; "
                "allowed on resume: the same, or resume=none with another run_dir"
            )


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A key that is younger than the checkpoint counts with its default."""
    model, mixers = config["model"], config["mixer"]
    sections = {
        "model": defaults(HybridLM) | {k: v for k, v in model.items() if k != "name"},
        "mixer": {name: _filled(mixers[name], f"mixer.{name}") for name in model["pattern"]},
    }
    return flatten(sections) | {"trainer.seed": config["trainer"]["seed"]}


def _filled(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    return defaults(locate(section["_target_"], f"{path}._target_")) | dict(section)
