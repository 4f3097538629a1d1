"""Rotary position embedding, arXiv 2104.09864."""

import torch
from torch import Tensor, nn

from models.precision import full_precision, widen
from models.sequence import SequenceInfo


class Rope(nn.Module):
    """Rotates [batch, seq, heads, dim] by the positions of the tokens in their documents.

    Entry i turns with entry i + dim / 2, at base^(-2i / dim) radians a token, divided by `factor`
    (linear position interpolation, arXiv 2306.15595). Angles are fp32 or wider. Raises ValueError
    for an odd dim, and for a base or factor that is not above 0.
    """

    def __init__(self, dim: int, *, base: float = 10_000.0, factor: float = 1.0) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"rope needs an even head dim, got {dim}")
        if base <= 0:
            raise ValueError(f"rope_base is {base}; it must be above 0, or null")
        if factor <= 0:
            raise ValueError(f"rope_factor is {factor}; it must be above 0")
        self.dim, self.base, self.factor = dim, base, factor
        self._made_with = base, factor

    def set(self, *, base: float | None = None, factor: float | None = None) -> None:
        """For what follows; None: as it was made with."""
        made_base, made_factor = self._made_with
        self.base = made_base if base is None else base
        self.factor = made_factor if factor is None else factor

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        with full_precision(x):
            wide = widen(x)
            steps = torch.arange(0, self.dim, 2, dtype=wide.dtype, device=x.device)
            frequencies = self.base ** (-steps / self.dim) / self.factor
            angles = (info.positions.unsqueeze(-1) * frequencies).unsqueeze(2)  # [B, S, 1, dim / 2]
            cos, sin = angles.cos(), angles.sin()
            first, second = wide.chunk(2, dim=-1)
            rotated = [first * cos - second * sin, second * cos + first * sin]
            return torch.cat(rotated, dim=-1).to(x.dtype)
