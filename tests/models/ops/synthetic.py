"""Operations that no mixer uses, for what is written against the contracts alone."""

import torch
from torch import Tensor

from models.ops.conv import ShiftedConv
from models.sequence import CausalConv, LinearRecurrence, Recurrent, SequenceInfo
from models.transition import DiagonalTransition, ScalarTransition


class DecayedWrites(LinearRecurrence):
    """S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T, with a decay per key channel."""

    transition = DiagonalTransition

    def decay(self, log_decay: Tensor) -> Tensor:
        return log_decay

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
        *,
        initial_state: Tensor | None = None,
    ) -> Recurrent:
        state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None])
        if initial_state is not None:
            state = initial_state
        outputs = []
        for t in range(q.shape[1]):
            keeps = (info.positions[:, t] > 0)[:, None, None, None]
            decayed = torch.where(keeps, state, 0) * self.decay(log_decay)[:, t, :, :, None].exp()
            written = beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
            state = decayed + written
            outputs.append((state * q[:, t, :, :, None]).sum(2))
        return Recurrent(torch.stack(outputs, dim=1), state)


class ScalarDecay(DecayedWrites):
    """One decay per head: that of the first key channel."""

    transition = ScalarTransition

    def decay(self, log_decay: Tensor) -> Tensor:
        return log_decay[..., :1]


class ViewConv(CausalConv):
    """The definition, returning a view, which may not be written to."""

    def forward(
        self, x: Tensor, weight: Tensor, info: SequenceInfo, *, history: Tensor | None = None
    ) -> Tensor:
        return _View.apply(ShiftedConv()(x, weight, info, history=history))


class _View(torch.autograd.Function):
    """Like many a kernel's wrapper."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad
