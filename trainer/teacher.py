"""The model that another one learns from: frozen, in the dtype of the run's products."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.hybrid import HybridLM
from models.moe import MoE
from models.precision import Island
from parallel.fsdp import Sharding, copy_whole
from trainer.batch import Batch
from trainer.build import build_model, share_sequences
from trainer.checkpoint.weights import load_weights, open_weights
from trainer.data.tokenizer import Tokenizer, build_tokenizer, is_tokenizer
from trainer.errors import ConfigError, naming
from trainer.settings import Setup

log = logging.getLogger(__name__)


class Teacher:
    """No module: engines, optimisers and checkpoints do not see it.

    autocast: the dtype of matrix products, or None for that of the parameters.
    """

    def __init__(self, model: HybridLM, *, autocast: torch.dtype | None = None) -> None:
        self.model, self._autocast = model.eval().requires_grad_(False), autocast

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[batch, seq, d_model] behind the final norm."""
        device, enabled = batch.tokens.device.type, self._autocast is not None
        with torch.autocast(device, self._autocast, enabled=enabled):
            return self.model(batch.tokens, batch.info)


def load_teacher(
    folder: str,
    *,
    student: HybridLM,
    setup: Setup,
    shard: bool,
    check: Callable[[HybridLM, HybridLM], None] = lambda student, teacher: None,
) -> Teacher:
    """The teacher of a model, from a checkpoint, a run folder, a native or a Hugging Face folder.

    shard: see `load_frozen`; check: of shapes, before there is memory. Raises ConfigError for
    another vocabulary too.
    """
    with naming("objective.teacher", folder):
        check_words(Path(folder), student.embed.num_embeddings, setup.tokenizer)
        teacher = load_frozen(
            Path(folder), setup=setup, shard=shard, check=lambda teacher: check(student, teacher)
        )
    size = sum(parameter.numel() for parameter in teacher.parameters())
    divided = shard and setup.mesh.group is not None
    place = f"layers over {setup.mesh.ranks} ranks" if divided else "whole on each rank"
    log.info("teacher %s: %.2f M parameters, %s", folder, size / 1e6, place)
    return Teacher(teacher, autocast=setup.numerics.autocast)


def load_frozen(
    path: Path,
    *,
    setup: Setup,
    shard: bool = False,
    check: Callable[[HybridLM], None] = lambda model: None,
) -> HybridLM:
    """A model for inference alone, under the schemes of the run.

    shard: ranks divide its layers among them and gather one while it computes; embedding and head
    stay whole. Raises ConfigError.
    """
    sections = open_weights(path).config
    model = build_model(sections["model"], sections["mixer"], vocab_size=1, ops=setup.ops)
    check(model)
    share_sequences(model, setup.parallelism, setup.mesh)
    sharding = _sharding(setup) if shard and setup.mesh.group is not None else None
    for unit in model.units():
        divided = sharding is not None and unit in [*model.layers]
        allocate(unit, setup, narrow=not divided)  # shards are gathered in the dtype of products
        if sharding is not None and divided:
            sharding.layer(unit)
    state = model.state_dict()
    load_weights(model, path, assign=lambda name, x: copy_whole(state[name], x))
    return model.eval()


def allocate(unit: nn.Module, setup: Setup, *, narrow: bool = True) -> nn.Module:
    """Gives a frozen unit on the meta device its memory.

    narrow: what matrix products alone read is kept in their dtype, to which autocast would round it
    in every use.
    """
    unit.requires_grad_(False).to(setup.numerics.parameters)
    wide = {p for m in unit.modules() if isinstance(m, Island) for p in m.parameters()}
    for module in unit.modules():
        if narrow and isinstance(module, nn.Linear | MoE):
            for parameter in module.parameters(recurse=False):
                if parameter not in wide:
                    parameter.data = parameter.data.to(setup.numerics.products)
    return unit.to_empty(device=setup.mesh.device)


def _sharding(setup: Setup) -> Sharding:
    return Sharding(
        setup.mesh,
        shard_ranks=setup.mesh.ranks,
        products=setup.numerics.autocast,
        reshard_after_forward=True,
        cpu_offload=False,
    )


def check_words(path: Path, own: int, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if a model of `own` words has others than the teacher.

    They are compared one by one where the teacher's tokenizer is there.
    """
    source = open_weights(path)
    words = source.shapes["embed.weight"][0]
    if words != own:
        raise ConfigError(f"it has {words} words, the model {own}; allowed: the same")
    name = source.tokenizer
    if name is None or not is_tokenizer(name):
        return
    if build_tokenizer(name).vocabulary() != tokenizer.vocabulary():
        raise ConfigError("its tokenizer has other words than data.tokenizer; allowed: the same")
