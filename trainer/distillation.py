"""Distillation on the logits (arXiv 1503.02531), in tiles of tokens: neither model's logits ever
exist at once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.hybrid import HybridLM
from models.precision import widen
from trainer.batch import IGNORE_INDEX, Batch
from trainer.loss import LanguageModelLoss
from trainer.teacher import Teacher


class DistillationLoss(LanguageModelLoss):
    """(1 - w) T^2 KL(teacher || student) + w (cross entropy), summed over the valid labels.

    T, the temperature, divides the logits of both in the divergence; T^2 keeps its gradient of one
    size (section 2 there). w is ce_weight. The teacher may be of another width. Evaluation is the
    language model's.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        teacher: Teacher,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        tile: int = 1024,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, tile=tile, autocast=autocast)
        self.teacher, self.beside = teacher, (teacher.model,)
        self._temperature, self._ce_weight = temperature, ce_weight

    def forward(self, batch: Batch, *, scores: bool = False) -> Any:
        if scores:
            return super().forward(batch, scores=True)
        guide = self.teacher.hidden(batch).flatten(0, 1)
        hidden = self._hidden(batch).flatten(0, 1)
        loss, kl, ce = _TiledDistillation.apply(
            hidden,
            self.model.head_weight,
            guide,
            self.teacher.model.head_weight,
            batch.labels.flatten(),
            self.tile,
            self.autocast or hidden.dtype,
            self._temperature,
            self._ce_weight,
        )
        self._count(kl=kl, cross_entropy=ce)
        return loss

    def flops_per_token(self, model: HybridLM, context: float) -> float:
        """With the teacher's forward pass."""
        return super().flops_per_token(model, context) + self.teacher.model.flops_per_token(context)


class _TiledDistillation(torch.autograd.Function):
    """Loss, divergence and cross entropy of hidden [tokens, dim] against weight [vocab, dim], given
    those of the teacher; see `trainer.loss._TiledLoss`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        guide: Tensor,
        guide_weight: Tensor,
        labels: Tensor,
        tile: int,
        matmul: torch.dtype,
        temperature: float,
        ce_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl, ce = widen(hidden.new_zeros(2)).unbind()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        low, guide_low = weight.to(matmul), guide_weight.to(matmul)
        for start in range(0, len(labels), tile):
            rows = slice(start, start + tile)
            h, y = hidden[rows].to(matmul), labels[rows, None]
            valid, label = y != IGNORE_INDEX, y.clamp(min=0)
            logits = widen(h @ low.mT)
            wanted = F.log_softmax(widen(guide[rows].to(matmul) @ guide_low.mT) / temperature, -1)
            found = F.log_softmax(logits / temperature, -1)
            log_prob = found if temperature == 1 else F.log_softmax(logits, -1)
            target = wanted.exp()
            kl += (wanted.sub_(found).mul_(target) * valid).sum()
            ce -= (log_prob.gather(1, label) * valid).sum()
            grad = found.exp().sub_(target).mul_((1 - ce_weight) * temperature)
            if ce_weight:
                grad += log_prob.exp_().scatter_add_(1, label, -valid.to(grad)).mul_(ce_weight)
            grad = grad.mul_(valid).to(matmul)
            grad_hidden[rows] = grad @ low
            grad_weight += grad.mT @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(kl, ce)
        return (1 - ce_weight) * temperature**2 * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, *[None] * 7


@torch.no_grad()
def divergence(
    hidden: Tensor,
    weight: Tensor,
    guide: Tensor,
    guide_weight: Tensor,
    labels: Tensor,
    *,
    tile: int,
    matmul: torch.dtype,
) -> Tensor:
    """The sum of KL(teacher || student) over valid labels, in nats, in fp32 or wider; arguments as
    of `_TiledDistillation`."""
    total = widen(hidden.new_zeros(()))
    low, guide_low = weight.to(matmul), guide_weight.to(matmul)
    tiles = zip(*(x.split(tile) for x in (hidden, guide, labels)), strict=True)
    for h, g, y in tiles:
        wanted = F.log_softmax(widen(g.to(matmul) @ guide_low.mT), -1)
        found = F.log_softmax(widen(h.to(matmul) @ low.mT), -1)
        kl = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        total += kl[y != IGNORE_INDEX].sum()
    return total
