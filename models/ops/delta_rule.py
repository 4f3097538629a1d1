"""The gated delta rule with a decay per key channel: KDA, GDN (one decay per head), DeltaNet.

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t

Kimi Linear, arXiv 2510.26692; WY form of the chunks as in Gated DeltaNet, arXiv 2412.06464.
`TokenLoopDeltaRule` is the definition. `ChunkedDeltaRule` is its fast form in plain PyTorch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.ops.delta_chunk import Inputs, Segment, cut, join
from models.precision import full_precision, widen
from models.sequence import LinearRecurrence, Recurrent, SequenceInfo
from models.transition import DenseTransition


class TokenLoopDeltaRule(LinearRecurrence):
    """The definition, token by token, in fp32 or wider."""

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
        dtype = v.dtype
        with full_precision(q):
            q, k, v, decay, beta = widen(q), widen(k), widen(v), widen(log_decay).exp(), widen(beta)
            state, starts = _initial(initial_state, k, v), info.starts
            outputs = []
            for t in range(q.shape[1]):
                forgets = starts[:, t, None, None, None]
                state = torch.where(forgets, 0, state) * decay[:, t, :, :, None]
                predicted = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
                error = beta[:, t, :, None] * (v[:, t] - predicted)
                state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
                outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return Recurrent(torch.stack(outputs, dim=1).to(dtype), state)


class ChunkedDeltaRule(LinearRecurrence):
    """Chunks of 64 tokens as matrix products, chained by one affine map per chunk.

    The backward keeps the inputs and one state per segment, and computes the rest again, a segment
    at a time: memory beside the inputs does not grow with the length, and a segment's tensors stay
    in the processor's cache.
    """

    chunk = 64
    segment = 16  # chunks

    # Segments would be unrolled into a graph that grows with the length.
    @torch.compiler.disable
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
        dtype = v.dtype
        with full_precision(q):
            tensors = [widen(x) for x in (q, k, v, log_decay, beta)]
            state = _initial(initial_state, tensors[1], tensors[2])
            output, state = _Chunked.apply(
                *tensors, state, info.starts, self.chunk, self.segment * self.chunk
            )
        return Recurrent(output.to(dtype), state)

    def summary(
        self, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, info: SequenceInfo
    ) -> tuple[DenseTransition, Tensor]:
        """Composes the maps of the chunks: no outputs. Without gradients."""
        with full_precision(k), torch.no_grad():
            k, v, log_decay, beta = (widen(x) for x in (k, v, log_decay, beta))
            update = _initial(None, k, v).flatten(0, 1)
            eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
            transition = eye.expand(len(update), -1, -1)
            for work, _ in self._segments((k, k, v, log_decay, beta), info):
                transition, update = work.compose(transition, update)
        state = (k.shape[0], k.shape[2])
        return DenseTransition(transition.unflatten(0, state)), update.unflatten(0, state)

    def state_gradient(
        self,
        grad_output: Tensor,
        grad_state: Tensor,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
    ) -> Tensor:
        """The reverse scan of the backward alone. Without gradients."""
        with full_precision(q), torch.no_grad():
            inputs = tuple(widen(x) for x in (q, k, grad_output, log_decay, beta))
            grad = widen(grad_state).flatten(0, 1)
            for work, part in self._segments(inputs, info, backwards=True):
                grad = work.state_gradient(cut(inputs[2][:, part], self.chunk), grad)
        return grad.view_as(grad_state)

    def _segments(
        self, inputs: tuple[Tensor, ...], info: SequenceInfo, *, backwards: bool = False
    ) -> Iterator[tuple[Segment, slice]]:
        parts = _parts(inputs[0].shape[1], self.segment * self.chunk)
        for part in reversed(parts) if backwards else parts:
            yield _segment(inputs, info.positions == 0, part, self.chunk), part


def _parts(seq: int, segment: int) -> list[slice]:
    return [slice(i, min(i + segment, seq)) for i in range(0, seq, segment)]


def _initial(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    if state is not None:
        return state.to(k.dtype)
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


class _Chunked(torch.autograd.Function):
    """Segment after segment; the backward in reverse, each segment computed again."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, state, starts, chunk, segment):
        inputs = (q, k, v, log_decay, beta)
        batch, seq, heads, _ = q.shape
        ctx.parts = _parts(seq, segment)
        ctx.chunk = chunk
        entering, outputs = [], []
        final = state.flatten(0, 1)
        for part in ctx.parts:
            work = _segment(inputs, starts, part, chunk)
            entering.append(final)
            states, final = work.states(final)
            outputs.append(join(work.output(states), batch, heads, part.stop - part.start))
        ctx.save_for_backward(*inputs, starts, *entering)
        return torch.cat(outputs, dim=1), final.view_as(state)

    @staticmethod
    def backward(ctx, grad_output, grad_state):
        q, k, v, log_decay, beta, starts, *entering = ctx.saved_tensors
        inputs = (q, k, v, log_decay, beta)
        batch, _, heads, _ = q.shape
        grads = [torch.empty_like(x) for x in inputs]
        grad_final = grad_state.flatten(0, 1)
        for part, state in zip(reversed(ctx.parts), reversed(entering), strict=True):
            work = _segment(inputs, starts, part, ctx.chunk)
            states, _ = work.states(state)
            grad = cut(grad_output[:, part], ctx.chunk)
            segment_grads, grad_final = work.backward(states, grad, grad_final)
            for grad, piece in zip(grads, segment_grads, strict=True):
                piece = join(piece, batch, heads, part.stop - part.start)
                grad[:, part] = piece if grad.dim() == 4 else piece.squeeze(-1)
        return *grads, grad_final.view_as(grad_state), None, None, None


def _segment(inputs: tuple[Tensor, ...], starts: Tensor, part: slice, chunk: int) -> Segment:
    return Segment(
        Inputs(*(cut(x[:, part], chunk) for x in inputs)), starts[:, part], inputs[0].shape[2]
    )
