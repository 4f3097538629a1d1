"""Rotary position embedding, arXiv 2104.09864."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.precision import full_precision, widen
from models.rope_scaling import Scaling, make_scaling
from models.sequence import SequenceInfo

# What a mixer calls the keywords of `make_rope`, in their order.
ROPE_KEYS = ("rope_base", "rope_factor", "rope_scaling", "rope_frequencies")


class Rope(nn.Module):
    """Rotates [batch, seq, heads, dim] by the positions of the tokens in their documents.

    Entry i turns with entry i + dim / 2, at base^(-2i / dim) radians a token, changed by `scaling`
    if that is given (YaRN's makes them longer, too), then divided by `factor` (linear position
    interpolation, arXiv 2306.15595); or at frequencies[i] for a converted model that has kept some
    of the pairs of another. Angles are fp32 or wider. Raises ValueError for an odd dim, a base or
    factor that is not above 0, and for frequencies that are not one a pair or come with a base,
    factor or scaling.
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float | None = 10_000.0,
        factor: float = 1.0,
        scaling: Scaling | None = None,
        frequencies: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"rope needs an even head dim, got {dim}")
        if factor <= 0:
            raise ValueError(f"rope_factor is {factor}; it must be above 0")
        if frequencies is None and (base is None or base <= 0):
            raise ValueError(f"rope_base is {base}; it must be above 0, or null")
        if frequencies is not None:
            _check_frequencies(frequencies, dim)
            if base is not None or factor != 1.0 or scaling is not None:
                raise ValueError(
                    "rope_frequencies are given; they go with rope_base null, rope_factor 1 and "
                    "rope_scaling null"
                )
        self.dim, self.base, self.factor, self.scaling = dim, base, factor, scaling
        self.frequencies = None if frequencies is None else list(frequencies)
        self._made_with = base, factor

    def set(self, *, base: float | None = None, factor: float | None = None) -> None:
        """For what follows; None: as it was made with. Raises ValueError for given frequencies."""
        if self.frequencies is not None and (base is not None or factor is not None):
            raise ValueError("rope_frequencies are given; allowed: no other base or factor")
        made_base, made_factor = self._made_with
        self.base = made_base if base is None else base
        self.factor = made_factor if factor is None else factor

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        with full_precision(x):
            wide = widen(x)
            turns = info.positions.unsqueeze(-1) * self.radians(wide)
            angles = turns.unsqueeze(2)  # [B, S, 1, dim / 2]
            cos, sin = angles.cos() * self.magnitude, angles.sin() * self.magnitude
            first, second = wide.chunk(2, dim=-1)
            rotated = [first * cos - second * sin, second * cos + first * sin]
            return torch.cat(rotated, dim=-1).to(x.dtype)

    @property
    def magnitude(self) -> float:
        """What the length of rotated entries is multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    def radians(self, like: Tensor) -> Tensor:
        """[dim / 2], a token, in the dtype and on the device of `like`."""
        if self.frequencies is not None:
            return torch.tensor(self.frequencies, dtype=like.dtype, device=like.device)
        assert self.base is not None
        steps = torch.arange(0, self.dim, 2, dtype=like.dtype, device=like.device)
        radians = self.base ** (-steps / self.dim)
        if self.scaling is not None:
            radians = self.scaling.apply(radians, self.base)
        return radians / self.factor


def _check_frequencies(frequencies: Sequence[float], dim: int) -> None:
    if len(frequencies) != dim // 2:
        raise ValueError(
            f"rope_frequencies are {len(frequencies)}; {dim} rotary channels have {dim // 2} pairs"
        )


def make_rope(
    dim: int,
    *,
    base: float | None,
    factor: float,
    scaling: Mapping[str, Any] | None,
    frequencies: Sequence[float] | None,
) -> Rope | None:
    """From a mixer's keys `rope_*`: None, hence no positions, without base and frequencies."""
    if base is None and frequencies is None:
        if scaling is not None:
            raise ValueError("rope_scaling is given; it needs a rope_base")
        if factor != 1.0:
            raise ValueError(f"rope_factor is {factor}; it needs a rope_base")
        return None
    made = None if scaling is None else make_scaling(scaling)
    return Rope(dim, base=base, factor=factor, scaling=made, frequencies=frequencies)
