"""Layer-wise distillation: each layer learns to do what the teacher's does with the same input.

The refined initialisation of Zebra-Llama (arXiv 2505.17272, section 3). Layers do not depend on
each other, and each is computed again in the backward pass: the activations of one layer exist at a
time, beside the input of each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from models.hybrid import HybridLM, Layer
from models.precision import widen
from models.residual import Stream, SumResidual
from models.sequence import SequenceInfo
from parallel.activation_checkpoint import checkpointed
from trainer.batch import IGNORE_INDEX, Batch
from trainer.errors import ConfigError
from trainer.loss import LanguageModelLoss
from trainer.teacher import Teacher

Norm = Literal["mse", "l2"]


class LayerwiseLoss(LanguageModelLoss):
    """The distances of each layer's output, and of its mixer's, from those of the teacher's layer
    behind the teacher's input of that layer; summed over layers and over valid labels.

    norm: of a token, mse for the mean squared error over the mean square of the teacher's output,
    l2 for the length of the difference, as published. Layers alone train: everything else of the
    model is frozen. Evaluation is the language model's.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        teacher: Teacher,
        norm: Norm = "mse",
        tile: int = 1024,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, tile=tile, autocast=autocast)
        model.requires_grad_(False)
        model.layers.requires_grad_(True)
        self.teacher, self.beside = teacher, (teacher.model,)
        self._norm = norm

    def forward(self, batch: Batch, *, scores: bool = False) -> Any:
        if scores:
            return super().forward(batch, scores=True)
        valid = batch.labels != IGNORE_INDEX
        with self._products(batch):
            x = self.teacher.model.embed(batch.tokens)
            anchor = x.new_zeros((), requires_grad=True)
            total = widen(x.new_zeros(()))
            for i in range(len(self.model.layers)):
                stream = (_Input.apply(x, anchor),)
                layer, mixer, x = checkpointed(self._compare, stream, i, batch.info, valid)
                total = total + layer + mixer
                x = x.detach()
                self._count(**{f"layer_{i:02}": layer, f"mixer_{i:02}": mixer})
        return total

    def flops_per_token(self, model: HybridLM, context: float) -> float:
        """Without heads, and without what is computed twice."""
        own, teacher = (
            m.flops_per_token(context) - 2 * m.head_weight.numel()
            for m in (model, self.teacher.model)
        )
        return 3 * own + teacher

    def _compare(self, stream: Stream, i: int, info: SequenceInfo, valid: Tensor) -> Stream:
        """-> the distances of layer i, of its mixer, and the teacher's output."""
        layer, guide = (cast(Layer, m.layers[i]) for m in (self.model, self.teacher.model))
        with torch.no_grad(), output_of(guide.mixer) as aimed:
            (target,) = guide((stream[0].detach(),), info)
        with output_of(layer.mixer) as made:
            (output,) = layer(stream, info)
        mixer = self._distance(made[0], aimed[0], valid)
        return self._distance(output, target, valid), mixer, target

    def _distance(self, output: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        target = widen(target)
        apart = widen(output) - target
        if self._norm == "l2":
            tokens = torch.linalg.vector_norm(apart, dim=-1)
        else:
            tokens = apart.square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
        return tokens.masked_fill(~valid, 0).sum()


class _Input(torch.autograd.Function):
    """The identity, where the backward pass of a layer ends.

    An input that asks for a gradient, though none is wanted: engines take it for the end of the
    layer, and let go of its parameters there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        return None, None


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Gets what the module returns while the context lasts."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def check_layers(student: HybridLM, teacher: HybridLM) -> None:
    """Raises ConfigError for models whose layers cannot be compared one by one."""
    counts = (
        ("layers", len(student.layers), len(teacher.layers)),
        ("channels", student.embed.embedding_dim, teacher.embed.embedding_dim),
    )
    for what, own, its in counts:
        if own != its:
            raise ConfigError(f"it has {its} {what}, the model {own}; allowed: as many")
    for name, model in (("the model", student), ("it", teacher)):
        if not isinstance(model.residual, SumResidual):
            raise ConfigError(f"{name} has model.residual_block, where layers see more than a sum")
