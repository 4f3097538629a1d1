"""Tensors in eight bits a value, with a scale for every block of up to 128 values of a row.

The block's largest value takes the largest code. int8 is then wrong by at most 1/254 of it all over
the block, fp8 (e4m3: three bits of mantissa) by 1/16 of each value: of normal numbers by 0.65 % and
2.6 %, root mean square. They take the same memory, so fp8 is for blocks of very uneven values.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.precision import widen

Format = Literal["int8", "fp8"]

BLOCK = 128
SMALLEST_BLOCK = 32  # a scale takes four bytes
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}


def can_hold(x: Tensor) -> bool:
    """Floating, with rows that blocks of at least 32 values tile."""
    return x.is_floating_point() and x.dim() > 0 and _block(x) >= SMALLEST_BLOCK


@dataclass(frozen=True)
class BlockScaled:
    """[..., dim] as codes of that shape and scales [..., dim / block, 1], fp32 or wider."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def encode(cls, x: Tensor, format: Format) -> "BlockScaled":
        """Rounds to nearest. A block with anything that is not finite has nothing else."""
        blocks = widen(x).unflatten(-1, (-1, _block(x)))
        scales = blocks.abs().amax(-1, keepdim=True) / _LARGEST[format]
        codes = blocks / scales.clamp(min=torch.finfo(scales.dtype).tiny)
        if format == "int8":
            codes.round_()
        return cls(codes.flatten(-2).to(_CODES[format]), scales, x.dtype)

    def decode(self) -> Tensor:
        blocks = self.codes.to(self.scales.dtype).unflatten(-1, (self.scales.shape[-2], -1))
        return blocks.mul_(self.scales).flatten(-2).to(self.dtype)


def _block(x: Tensor) -> int:
    return math.gcd(x.shape[-1], BLOCK)
