"""Replaces `auto` in the section `parallel`, before the process groups are made."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops.select import Ops
from models.sequence import SequenceInfo
from parallel.auto import Setting, decide
from parallel.shapes import Shape, record_shapes
from trainer.build import build_model, mixers_of
from trainer.construct import call
from trainer.settings import Numerics, Parallelism, Settings

Config = Mapping[str, Any]

# What may be `auto`; the values stand for it while the other keys are checked.
CHOSEN = {
    "ulysses": 1,
    "softmax": "ring",
    "latent": "ring",
    "recurrence": "state_passing",
    "outer": "ring",
}


def resolve_parallel(
    config: Config, environ: Mapping[str, str] = os.environ
) -> tuple[dict[str, Any], list[str]]:
    """The section `parallel` without `auto`, and lines for the log that say why.

    config: the sections parallel, model, mixer, data and trainer; environ: has torchrun's
    variables in a run on ranks. All ranks find the same. Raises ConfigError.
    """
    section = dict(config["parallel"])
    left = [key for key in CHOSEN if section.get(key) == "auto"]
    if not left:
        return section, []
    stated: Parallelism = call(
        Parallelism, section | {key: CHOSEN[key] for key in left}, "parallel"
    )
    settings: Settings = call(Settings, config["trainer"], "trainer")
    ranks = stated.cp or (int(environ["WORLD_SIZE"]) if "RANK" in environ else 1)
    setting = Setting(
        ranks=ranks,
        node=int(environ.get("LOCAL_WORLD_SIZE", 1)),
        tokens=settings.micro_batch_size * _longest(config["data"]) // ranks,
        size=_activation_size(settings),
        scan_ranks=stated.scan_ranks,
        ulysses=None if "ulysses" in left else stated.ulysses,
    )
    decision = decide(_shapes(config), setting)
    section |= {key: getattr(decision, key) for key in left}
    shared = ranks > 1
    lines = [f"{op}={why}" for op, why in decision.reasons.items() if shared and op in left]
    return section, lines


def _longest(data: Config) -> int:
    """Row of all stages, as far as they are understood; what is not is refused with the data."""
    stages = [stage for stage in data["stages"] or () if isinstance(stage, Mapping)]
    lengths = [stage.get("seq_len") for stage in stages]
    return max([data["seq_len"], *(x for x in lengths if isinstance(x, int))])


def _shapes(config: Config) -> set[Shape]:
    """Of the operations in one mixer of each kind in the model's pattern."""
    found: set[Shape] = set()
    with FakeTensorMode():  # no memory, as on the meta device, but autocast knows this one
        sections = config["model"], config["mixer"]
        model = build_model(*sections, vocab_size=1, ops=Ops(), device="cpu")
        kinds = dict(zip(model.pattern, mixers_of(model), strict=True))
        info = SequenceInfo.from_lengths([[2]])
        x = torch.empty(*info.shape, config["model"]["d_model"])
        for mixer in kinds.values():
            found |= record_shapes(mixer, partial(mixer, x, info))
    return found


def _activation_size(settings: Settings) -> int:
    """Bytes of one value that travels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Numerics.choose(settings.precision, device).products.itemsize
