"""The stages of a curriculum, from their section of the configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.construct import call
from trainer.data.steps import RopeSetting, Stage
from trainer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StageKeys:
    """An entry of data.stages; what is left out is that of the section data.

    tokens: of full rows, padding included, after which the next stage begins; the step that
    reaches them belongs to this one.
    """

    seq_len: int
    batch_size: int
    weights: Mapping[str, float]
    tokens: float | None = None
    rope: Mapping[str, Any] | None = None


def build_stages(
    entries: Sequence[Mapping[str, Any]] | None,
    *,
    seq_len: int,
    batch_size: int,
    weights: Mapping[str, float],
) -> list[Stage]:
    """One without end for no entries; raises ConfigError naming the key that is wrong."""
    _check_sizes("data", seq_len, batch_size)
    _check_weights("data.sources", weights, weights)
    own: dict[str, Any] = {"seq_len": seq_len, "batch_size": batch_size, "weights": weights}
    if not entries:
        return [Stage(**own)]
    stages = []
    for i, entry in enumerate(entries):
        path = f"data.stages[{i}]"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{path}={entry}: allowed: a section, e.g. {{seq_len: 8192}}")
        keys: StageKeys = call(StageKeys, {**own, **entry}, path)
        last = i == len(entries) - 1
        stages.append(_stage(keys, path, weights, last=last))
    return stages


def _stage(keys: StageKeys, path: str, weights: Mapping[str, float], *, last: bool) -> Stage:
    _check_sizes(path, keys.seq_len, keys.batch_size)
    _check_weights(f"{path}.weights", keys.weights, weights)
    if last and keys.tokens is not None:
        raise ConfigError(f"{path}.tokens={keys.tokens}: the last stage has no end; allowed: none")
    if not last and (keys.tokens is None or keys.tokens <= 0):
        raise ConfigError(
            f"{path}.tokens={keys.tokens}: allowed: above 0, as another stage comes behind it"
        )
    per_step = keys.batch_size * keys.seq_len
    return Stage(
        seq_len=keys.seq_len,
        batch_size=keys.batch_size,
        weights=keys.weights,
        steps=None if keys.tokens is None else math.ceil(keys.tokens / per_step),
        rope=call(RopeSetting, keys.rope or {}, f"{path}.rope"),
    )


def _check_sizes(path: str, seq_len: int, batch_size: int) -> None:
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{path}.{name}={value}: must be at least 1")


def _check_weights(path: str, weights: Mapping[str, float], known: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if name not in known:
            raise ConfigError(
                f"{path}.{name}={weight}: no such source; allowed: {', '.join(known)}"
            )
        if weight < 0:
            raise ConfigError(f"{path}.{name}={weight}: must be at least 0")
    if not any(weights.values()):
        raise ConfigError(f"{path}={dict(weights)}: must not all be 0")
