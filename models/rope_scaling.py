"""Rules that slow rotary positions down for a context longer than that of pre-training."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """magnitude: what rotated queries and keys are multiplied by, as the rule's paper has it."""

    @property
    def magnitude(self) -> float: ...

    def apply(self, radians: Tensor, base: float) -> Tensor:
        """radians: [dim / 2], a token, base^(-2i / dim) for pair i."""
        ...


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """The rule of Llama 3.1 (arXiv 2407.21783).

    A frequency that turns fewer than low_freq_factor times in original_max_position_embeddings
    tokens is divided by `factor`, one that turns more than high_freq_factor times is kept; between
    them the share that is kept grows evenly with the turns. Raises ValueError where that makes no
    sense.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def __post_init__(self) -> None:
        _check_extent(self)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope_scaling is {self}; allowed: 0 < low_freq_ < high_freq_factor")

    @property
    def magnitude(self) -> float:
        return 1.0

    def apply(self, radians: Tensor, base: float) -> Tensor:
        turns = self.original_max_position_embeddings * radians / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return radians * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN, arXiv 2309.00071.

    Pairs that turn fewer than beta_slow times in original_max_position_embeddings tokens are
    divided by `factor`, those that turn more than beta_fast times are kept; between them the share
    that is kept falls evenly from pair to pair, with `truncate` between whole pairs.
    attention_factor: the magnitude; None: 0.1 ln(factor) + 1. Raises ValueError where that makes no
    sense.
    """

    factor: float
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_extent(self)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(f"rope_scaling is {self}; allowed: 0 < beta_slow < beta_fast")
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ValueError(f"rope_scaling is {self}; its attention_factor must be above 0")

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1.0)) + 1

    def apply(self, radians: Tensor, base: float) -> Tensor:
        pairs = len(radians)
        first, last = (self._pair(turns, pairs, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        pair = torch.arange(pairs, dtype=radians.dtype, device=radians.device)
        kept = 1 - ((pair - first) / max(last - first, 1e-3)).clamp(0, 1)
        return radians * (kept + (1 - kept) / self.factor)

    def _pair(self, turns: float, pairs: int, base: float) -> float:
        """That which turns so many times in the original context."""
        length = self.original_max_position_embeddings
        return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(base)


RULES = {"llama3": Llama3Scaling, "yarn": YarnScaling}


def rule_keys(kind: str) -> tuple[list[str], list[str]]:
    """Those that a rule needs, and those that may be left out."""
    needed: list[str] = []
    optional: list[str] = []
    for field in fields(RULES[kind]):
        (needed if field.default is MISSING else optional).append(field.name)
    return needed, optional


def make_scaling(keys: Mapping[str, Any]) -> Scaling:
    """From rope_type, llama3 where there is none, and the keys of its rule.

    Raises ValueError for another rule, and unless its keys are there and numbers.
    """
    values = dict(keys)
    kind = values.pop("rope_type", "llama3")
    if kind not in RULES:
        raise ValueError(f"rope_scaling.rope_type is {kind!r}; allowed: {', '.join(RULES)}")
    needed, optional = rule_keys(kind)
    numbers = all(isinstance(x, int | float | None) for x in values.values())
    if not set(needed) <= set(values) <= {*needed, *optional} or not numbers:
        names = ", ".join(["rope_type", *needed, *optional])
        raise ValueError(f"rope_scaling is {dict(keys)}; its keys are {names}")
    return RULES[kind](**values)


def _check_extent(rule: Llama3Scaling | YarnScaling) -> None:
    if rule.factor <= 0 or rule.original_max_position_embeddings < 1:
        raise ValueError(f"rope_scaling is {rule}; its factor and length must be above 0")
