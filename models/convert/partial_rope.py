"""Rotary channels are parted from the others, which lose their rotation."""

from torch import Tensor

from models.checkpoints.config import Config
from models.convert.converted import Stage
from models.convert.forms import Attention
from models.convert.options import LatentOptions
from models.convert.rorope import rorope
from models.convert.select_rope import select_rope
from models.convert.source import frequencies
from models.convert.zebra_rope import zebra_rope


def part_rope(
    attention: Attention, teacher: Config, options: LatentOptions, moment: Tensor | None
) -> list[Stage]:
    """teacher: keywords of the mixer. Raises ValueError for sizes that do not fit its heads."""
    size = _rope_dim(attention, options)
    turning = bool(attention.frequencies.any())
    name = f"partial rope ({options.rope})"
    if options.rope == "select":
        exact = size == attention.head_dim or not turning
        return [Stage(name, exact, select_rope(attention, size, options.pairs, moment))]
    if options.rope == "zebra":
        turns = frequencies(teacher, size).to(attention.frequencies)
        return [Stage(name, False, zebra_rope(attention, size, turns))]
    return _rotate(attention, size, _freqfold(attention, size, options.freqfold), moment)


def _rotate(attention: Attention, size: int, freqfold: int, moment: Tensor | None) -> list[Stage]:
    """The rotation by itself, where that is exact, and what it is for."""
    turning = bool(attention.frequencies.any())
    whole = attention.key.shape[0] * attention.head_dim
    stages = []
    if freqfold == 1 or not turning:
        stages.append(Stage("rotation", True, rorope(attention, whole, 1, moment)))
    if size < whole or not stages:
        form = rorope(attention, size, freqfold, moment)
        stages.append(Stage("partial rope (rorope)", not turning, form))
    return stages


def _rope_dim(attention: Attention, options: LatentOptions) -> int:
    head_dim, size = attention.head_dim, options.rope_dim
    if size == "full":
        if options.rope == "zebra":
            raise ValueError("rope_dim is full; rope=zebra allows an even number below head_dim")
        return head_dim if options.rope == "select" else attention.key.shape[0] * head_dim
    most = head_dim - 2 if options.rope == "zebra" else head_dim
    if size % 2 or size > most:
        raise ValueError(f"rope_dim is {size}; allowed: even numbers up to {most}")
    if options.rope == "rorope" and head_dim % size:
        raise ValueError(f"rope_dim is {size}; with rope=rorope it must divide {head_dim}")
    return size


def _freqfold(attention: Attention, size: int, given: int | None) -> int:
    """size: rotary channels."""
    head_dim = attention.head_dim
    if size > head_dim:
        if given not in (None, 1):
            raise ValueError(f"freqfold is {given}; with rope_dim=full allowed: 1, or null")
        return 1
    least, pairs = head_dim // size, head_dim // 2
    fold = least if given is None else given
    if fold % least or pairs % fold:
        raise ValueError(
            f"freqfold is {fold}; with rope_dim={size} allowed: multiples of {least} that divide "
            f"{pairs}, or null for {least}"
        )
    return fold
