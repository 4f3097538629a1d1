"""A model from the two sections of its configuration, for who has no trainer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from models.ffn import SwiGLU
from models.hybrid import HybridLM
from models.mixer import Mixer
from models.moe import MoE
from models.ops.select import Ops

Section = Mapping[str, Any]


def build(
    model: Section, mixer: Section, *, classes: Mapping[str, type[Mixer]], ops: Ops
) -> HybridLM:
    """classes: the mixers by the names that the sections have for them.

    Raises ValueError for a configuration that makes no model.
    """
    keywords = {k: v for k, v in model.items() if k not in ("name", "ffn", "moe")}
    try:
        ffn, moe = model["ffn"], model["moe"]
        return HybridLM(
            **keywords,
            mixers={name: _mixer(section, classes) for name, section in mixer.items()},
            ffn=None if ffn is None else partial(SwiGLU, **ffn),
            moe=None if moe is None else partial(MoE, **moe),
            ops=ops,
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"this configuration makes no model: {error}") from error


def _mixer(section: Section, classes: Mapping[str, type[Mixer]]) -> partial[Mixer]:
    keywords = {key: value for key, value in section.items() if not key.startswith("_")}
    return partial(classes[section["_target_"]], **keywords)
