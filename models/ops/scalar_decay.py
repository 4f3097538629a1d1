"""One decay per head inside a chunk: a number for each pair of tokens, exact for any decay.

The decay from token j to token i is exp of the sum of the log-decays behind j up to i. Each such
sum is run up from its own start, none is a difference of two others, so weak decays next to strong
ones keep their precision. 64 x 64 numbers a chunk, where a decay per channel needs the products of
`dyadic.py`.

Shapes: X chunks of all rows and heads, C tokens a chunk, K key channels.
"""

import torch
from torch import Tensor


class ScalarDecay:
    """Of log-decays [X, C, 1]. Differentiable; `backward` is for whoever does without autograd.

    between: [X, C, C], from token j, not included, to token i, included; 0 where j > i.
    prefix: [X, C, 1], from the chunk's start to each token, itself included; suffix: [X, C, 1],
    after each token, up to the chunk's end.
    """

    def __init__(self, log_decay: Tensor) -> None:
        size = log_decay.shape[1]
        # Column 0 sums from the chunk's start, column j + 1 from behind token j.
        sums = log_decay.expand(-1, -1, size + 1).tril().cumsum(1)
        decays = sums.exp().tril(1)
        self.prefix, self.between = decays[..., :1], decays[..., 1:]
        self.suffix = decays[:, -1, 1:].unsqueeze(-1)

    @staticmethod
    def backward(
        grad_log_between: Tensor, grad_log_prefix: Tensor, grad_log_suffix: Tensor
    ) -> Tensor:
        """Gradient of log_decay, from those of the logarithms of the three."""
        grad = torch.cat((grad_log_prefix, grad_log_between), dim=-1)
        grad[:, -1, 1:] += grad_log_suffix.squeeze(-1)
        return grad.flip(1).cumsum(1).flip(1).tril().sum(-1, keepdim=True)


class ScalarScores:
    """What `DyadicScores` computes, for one decay per head: log_decay [X, C, 1]; prefix and suffix
    are [X, C, 1]."""

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor) -> None:
        decay = ScalarDecay(log_decay)
        self.prefix, self.suffix = decay.prefix, decay.suffix
        self.between = decay.between.tril(-1).unsqueeze(1)
        self.rows, self.keys = torch.cat((q, k), dim=1), k  # [X, 2 C, K]
        self.scores: Tensor = (self.rows @ k.mT).unflatten(1, (2, -1)).mul_(self.between)

    def backward(
        self, grad_scores: Tensor, grad_log_prefix: Tensor, grad_log_suffix: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and log_decay; those of prefix and suffix come per channel."""
        grad = (grad_scores * self.between).flatten(1, 2)  # [X, 2 C, C]
        grad_q, grad_k = (grad @ self.keys).chunk(2, dim=1)
        grad_log_decay = ScalarDecay.backward(
            (grad_scores * self.scores).sum(1),
            grad_log_prefix.sum(-1, keepdim=True),
            grad_log_suffix.sum(-1, keepdim=True),
        )
        return grad_q, grad_k + grad.mT @ self.rows, grad_log_decay
