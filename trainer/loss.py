"""The loss of a language model, in tiles of tokens: the logits never exist at once.

At 163,840 words of vocabulary the fp32 logits of 32k tokens are 20 GiB, and their gradient as much
again. A tile's logits, loss and both gradients are made together and dropped; the backward pass
only scales what the forward pass left.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.hybrid import HybridLM
from models.precision import widen
from trainer.batch import IGNORE_INDEX, Batch
from trainer.engine import LossModule, TokenScores


class LanguageModelLoss(LossModule):
    """The one module that an engine wraps: no parameter of the model is read outside its forward.

    autocast: the dtype of matrix multiplications, or None for that of the parameters.
    """

    def __init__(
        self, model: HybridLM, *, tile: int = 1024, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if tile < 1:
            raise ValueError(f"loss_tile is {tile}; allowed: 1 or more tokens")
        self.model, self.tile, self.autocast = model, tile, autocast

    def forward(self, batch: Batch, *, scores: bool = False) -> Any:
        """-> the sum of the token losses, a scalar in fp32 or wider; 0 if no label is valid.

        scores: -> `TokenScores` instead, without gradients.
        """
        hidden = self._hidden(batch).flatten(0, 1)
        weight, matmul = self.model.head_weight, self.autocast or hidden.dtype
        if scores:
            return self._score(hidden, weight.to(matmul), batch.labels)
        return _TiledLoss.apply(hidden, weight, batch.labels.flatten(), self.tile, matmul)

    @torch.no_grad()
    def _score(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> TokenScores:
        losses, hits = [], []
        tiles = zip(hidden.split(self.tile), labels.flatten().split(self.tile), strict=True)
        for h, y in tiles:
            logits = widen(h.to(weight.dtype) @ weight.mT)
            loss = F.cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none")
            losses.append(loss)
            hits.append(logits.argmax(-1) == y)
        return TokenScores(torch.cat(losses).view_as(labels), torch.cat(hits).view_as(labels))

    def _hidden(self, batch: Batch) -> Tensor:
        with self._products(batch):
            return self.model(batch.tokens, batch.info)

    def _products(self, batch: Batch) -> torch.autocast:
        """The context of the model's matrix products."""
        device, enabled = batch.tokens.device.type, self.autocast is not None
        return torch.autocast(device, self.autocast, enabled=enabled)


class _TiledLoss(torch.autograd.Function):
    """Sum of cross entropies of hidden [tokens, dim] against weight [vocab, dim].

    The weight's gradient adds up in the weight's own dtype (fp32 masters) over the tiles, whatever
    the dtype of the multiplications.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, matmul: torch.dtype
    ) -> Tensor:
        total = widen(hidden.new_zeros(()))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        low = weight.to(matmul)
        for start in range(0, len(labels), tile):
            rows = slice(start, start + tile)
            h, y = hidden[rows].to(matmul), labels[rows, None]
            log_prob = F.log_softmax(widen(h @ low.mT), dim=-1)
            valid, target = y != IGNORE_INDEX, y.clamp(min=0)
            total -= (log_prob.gather(1, target) * valid).sum()
            grad = log_prob.exp_().scatter_add_(1, target, -torch.ones_like(log_prob[:, :1]))
            grad = grad.mul_(valid).to(matmul)
            grad_hidden[rows] = grad @ low
            grad_weight += grad.mT @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale, None, None, None
