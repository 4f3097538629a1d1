"""The delta rule over one segment of chunks, and its adjoint.

Notation of Kimi Linear (arXiv 2510.26692, section 3) with beta folded in. Per chunk, with P the
decay from its start and R the decay to its end:

    T = (I + Diag(beta) A_kk)^-1,   U = T (beta V),   W = T (beta K P)
    V' = U - W S,   O = (Q P) S + A_qk V' = (Q P - A_qk W) S + A_qk U,   S_next = M S + B,
    M = Diag(P_last) - (K R)^T W,   B = (K R)^T U

so chunks are chained by affine maps of the state, and so is the backward, by their transposes:
dS = M^T dS_next + (Q P)^T dO - W^T A_qk^T dO. A document start inside a chunk cuts the scores
across it and empties P after it, R before it, and P_last.

Shapes: n chunks of the segment first, then batch x heads, C tokens, K and V channels.
"""

import torch
from torch import Tensor

from models.ops.chunks import Documents, Inputs
from models.ops.dyadic import DyadicScores
from models.ops.scalar_decay import ScalarScores


class Segment:
    """Everything that the forward of one segment derives from its inputs alone."""

    own = True  # a query sees its own chunk

    def __init__(self, inputs: Inputs, documents: Documents | None) -> None:
        q, k, v, log_decay, beta = inputs
        self.inputs, self.documents = inputs, documents
        scores: type[DyadicScores] | type[ScalarScores]
        scores = ScalarScores if log_decay.shape[-1] == 1 else DyadicScores
        self.scored = scores(q, k, log_decay)
        prefix, suffix = self.scored.prefix, self.scored.suffix
        if documents is not None:
            self.scored.scores *= documents.same.unsqueeze(1)
            prefix, suffix = prefix * documents.from_start, suffix * documents.to_end
        self.qk, self.kk = self.scored.scores.unbind(1)
        self.qk.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
        self.through = prefix[:, -1]  # decay of a whole chunk, [X, K] or [X, 1]
        self.prefix, self.suffix = prefix, suffix
        self.q_in, self.k_in, self.k_out = q * prefix, k * prefix, k * suffix

        eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
        self.inverse = torch.linalg.solve_triangular(
            beta * self.kk, eye.expand_as(self.kk), upper=False, unitriangular=True
        )
        self.u, self.w = self.inverse @ (beta * v), self.inverse @ (beta * self.k_in)
        # [X, K, K] and [X, K, V]: the state that leaves is transition @ state + update.
        self.transition = (self.k_out.mT @ self.w).neg_()
        self.transition.diagonal(dim1=1, dim2=2).add_(self.through)
        self.update = self.k_out.mT @ self.u

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state [batch x heads, K, V] before each chunk, [X, K, V], and after the last.

        Here and in `output` a state may have further columns in front, whose values are zero.
        """
        size = (-1, state.shape[0])
        transitions = self.transition.unflatten(0, size)
        updates = _behind_zeros(self.update, state.shape[-1]).unflatten(0, size)
        before = []
        for transition, update in zip(transitions.unbind(0), updates.unbind(0), strict=True):
            before.append(state)
            state = torch.baddbmm(update, transition, state)
        return torch.cat(before), state

    def output(self, states: Tensor) -> Tensor:
        """[X, C, V]."""
        reads = torch.baddbmm(self.q_in, self.qk, self.w, alpha=-1)
        written = _behind_zeros(self.qk @ self.u, states.shape[-1])
        return torch.baddbmm(written, reads, states)

    def backward(
        self, states: Tensor, grad_output: Tensor, grad_state: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Gradients of the inputs and of the state that entered, from those of the output
        [X, C, V] and of the state that left [batch x heads, K, V]."""
        q, k, v, _, beta = self.inputs
        written = torch.baddbmm(self.u, self.w, states, alpha=-1)
        grad_written = self.qk.mT @ grad_output
        grad_after, grad_state = self._states_backward(grad_output, grad_written, grad_state)
        grad_written.baddbmm_(self.k_out, grad_after)

        # Through U and W, that is through the triangular system they solve.
        grad_w = torch.bmm(grad_written, states.mT).neg_()
        from_u, from_w = self.inverse.mT @ grad_written, self.inverse.mT @ grad_w
        grad_scores = torch.empty_like(self.scored.scores)
        grad_qk, grad_kk = grad_scores.unbind(1)
        grad_qk.copy_(grad_output @ written.mT).mul_(self.own)
        grad_system = torch.baddbmm(from_u @ self.u.mT, from_w, self.w.mT).neg_()
        torch.mul(grad_system, beta, out=grad_kk)
        if self.documents is not None:
            grad_scores *= self.documents.same.unsqueeze(1)
        grad_beta = (from_u * v).sum(-1) + (from_w * self.k_in).sum(-1)
        grad_beta += grad_system.mul_(self.kk).sum(-1)

        grad_q_in, grad_k_in = grad_output @ states.mT, beta * from_w
        grad_k_out = written @ grad_after.mT
        grad_log_prefix = (grad_q_in * self.q_in).addcmul_(grad_k_in, self.k_in)
        grad_log_prefix[:, -1] += self.through * (states * grad_after).sum(-1)
        grad_q, grad_k, grad_log_decay = self.scored.backward(
            grad_scores, grad_log_prefix, grad_k_out * self.k_out
        )
        diagonal = grad_qk.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        grad_q.addcmul_(grad_q_in, self.prefix).addcmul_(diagonal, k)
        grad_k.addcmul_(grad_k_in, self.prefix).addcmul_(diagonal, q)
        grad_k.addcmul_(grad_k_out, self.suffix)
        grads = Inputs(grad_q, grad_k, beta * from_u, grad_log_decay, grad_beta.unsqueeze(-1))
        return grads, grad_state

    def _states_backward(
        self, grad_output: Tensor, grad_written: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the state after each chunk, [X, K, V], and of the one before the first."""
        local = torch.baddbmm(
            self.q_in.mT @ grad_output, self.w.mT, grad_written, alpha=-1
        ).unflatten(0, (-1, grad_state.shape[0]))
        transitions = self.transition.unflatten(0, (-1, grad_state.shape[0]))
        after = []
        for transition, grad in zip(
            reversed(transitions.unbind(0)), reversed(local.unbind(0)), strict=True
        ):
            after.append(grad_state)
            grad_state = torch.baddbmm(grad, transition.mT, grad_state)
        return torch.cat(after[::-1]), grad_state


def _behind_zeros(x: Tensor, columns: int) -> Tensor:
    missing = columns - x.shape[-1]
    return torch.nn.functional.pad(x, (missing, 0)) if missing else x
