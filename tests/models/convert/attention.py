"""Random attention of a teacher, and inputs whose channels are far from alike."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoints.config import Config
from models.convert.measure import Row
from models.mixer import Mixer
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.build import compose, randomise
from trainer.construct import construct

D_MODEL = 48
SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_base": 100.0}
BIASED = {"qkv_bias": True, "out_bias": True}


def make(section: Config) -> Mixer:
    """In fp64, random everywhere."""
    return randomise(construct(section, "mixer")(D_MODEL, ops=Ops()).double())


class Teacher(NamedTuple):
    section: Config
    tensors: dict[str, Tensor]  # those of the mixer, not copies
    mixer: Mixer


def teacher(**keywords) -> Teacher:
    """Grouped-query attention."""
    section = compose([])["mixer"]["gqa"] | SIZES | keywords
    mixer = make(section)
    return Teacher(section, dict(mixer.state_dict()), mixer)


def inputs() -> list[tuple[Tensor, SequenceInfo]]:
    """[1, S, D_MODEL], rows of packed documents."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64) / 7
    made = []
    for lengths in ([20, 9, 11], [40]):
        x = torch.randn(1, sum(lengths), D_MODEL, generator=generator, dtype=torch.float64)
        x = (x * torch.linspace(0.1, 2.0, D_MODEL)) @ mix + 0.5
        made.append((x, SequenceInfo.from_lengths([lengths])))
    return made


def rows() -> list[Row]:
    return [Row.of(x, info) for x, info in inputs()]


def moment() -> Tensor:
    """The mean of x x^T with a one behind x."""
    x = torch.cat([row.x for row in rows()])
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    return x.T @ x / len(x)
