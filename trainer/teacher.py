"""The model that another one learns from: frozen, in the dtype of the run's products."""

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
from trainer.checkpoint.weights import WeightSource, load_weights, open_weights
from trainer.data.tokenizer import TOKENIZER, Tokenizer, build_tokenizer
from trainer.errors import ConfigError, naming
from trainer.settings import Setup


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
    """The teacher of a model, under the schemes of the run.

    folder: a checkpoint, a run folder, a native or a Hugging Face folder. shard: ranks divide its
    layers among them and gather one while it computes; embedding and head stay whole. check: of
    shapes, before there is memory. Raises ConfigError for another vocabulary.
    """
    with naming("objective.teacher", folder):
        source = open_weights(Path(folder))
        _check_words(source, student, setup.tokenizer)
        model = build_model(
            source.config["model"], source.config["mixer"], vocab_size=1, ops=setup.ops
        )
        check(student, model)
        share_sequences(model, setup.parallelism, setup.mesh)
        _materialise(model, setup, shard=shard)
        state = model.state_dict()
        load_weights(model, Path(folder), assign=lambda name, x: copy_whole(state[name], x))
    return Teacher(model, autocast=setup.numerics.autocast)


def _materialise(model: HybridLM, setup: Setup, *, shard: bool) -> None:
    """Gives the units of a model on the meta device their memory, or this rank its rows of it."""
    mesh, numerics, sharding = setup.mesh, setup.numerics, None
    if shard and mesh.group is not None:
        sharding = Sharding(
            mesh,
            shard_ranks=mesh.ranks,
            products=numerics.autocast,
            reshard_after_forward=True,
            cpu_offload=False,
        )
    model.requires_grad_(False)
    for unit in model.units():
        unit.to(numerics.parameters)
        divided = sharding is not None and unit in [*model.layers]
        if not divided:
            _narrow(unit, numerics.products)
        unit.to_empty(device=mesh.device)
        if sharding is not None and divided:
            sharding.layer(unit)


def _narrow(unit: nn.Module, products: torch.dtype) -> None:
    """Keeps what matrix products alone read in their dtype, to which autocast would round it."""
    wide = {p for m in unit.modules() if isinstance(m, Island) for p in m.parameters()}
    for module in unit.modules():
        if isinstance(module, nn.Linear | MoE):
            for parameter in module.parameters(recurse=False):
                if parameter not in wide:
                    parameter.data = parameter.data.to(products)


def _check_words(source: WeightSource, student: HybridLM, tokenizer: Tokenizer) -> None:
    """One by one, where the teacher has a tokenizer beside it."""
    words, own = source.shapes["embed.weight"][0], student.embed.num_embeddings
    if words != own:
        raise ConfigError(f"it has {words} words, the model {own}; allowed: the same")
    folder = source.tokenizer_folder
    if folder is None or not (folder / TOKENIZER).exists():
        return
    if build_tokenizer(str(folder)).vocabulary() != tokenizer.vocabulary():
        raise ConfigError("its tokenizer has other words than data.tokenizer; allowed: the same")
