"""Linear attention with one decay per head: Mamba-2 and its relatives.

    S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t

State space duality, arXiv 2405.21060: there k is B, q is C, v is x and beta the time step; with
beta 1 and a fixed decay it is lightning attention, arXiv 2401.04658. `TokenLoopDecayedSum` is the
definition. `ChunkedDecayedSum` is its fast form in plain PyTorch.
"""

import torch
from torch import Tensor

from models.ops.chunks import Documents, Grid, Inputs, cut, entering, join
from models.ops.scalar_decay import ScalarDecay
from models.precision import full_precision, widen
from models.sequence import LinearRecurrence, Recurrent, Response, SequenceInfo
from models.transition import ScalarTransition


class DecayedSum(LinearRecurrence):
    """log_decay is [batch, seq, heads, 1]. Nothing in the row depends on the state that enters but
    by a decay, so that it is added to what came of the row without it."""

    transition = ScalarTransition

    @torch.compiler.disable
    def response(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
    ) -> Response:
        with full_precision(q):
            alone = self(q, k, v, log_decay, beta, info)
            within = info.starts.cumsum(1) == 0  # of the document that goes on into the row
            decay = widen(log_decay).cumsum(1).exp() * within[:, :, None, None]
            reads = widen(q) * decay
        through = decay[:, -1]  # [batch, heads, 1]

        def enter(state: Tensor) -> Recurrent:
            with full_precision(q):
                state = state.to(reads.dtype)
                output = alone.output + torch.einsum("bthk,bhkv->bthv", reads, state)
                final = alone.final_state + through.unsqueeze(-1) * state
            return Recurrent(output.to(v.dtype), final)

        transition = ScalarTransition(through.detach())
        return Response(reads.detach(), transition, alone.final_state.detach(), enter)


class TokenLoopDecayedSum(DecayedSum):
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
            state, starts = entering(initial_state, k, v), info.starts
            outputs = []
            for t in range(q.shape[1]):
                forgets = starts[:, t, None, None, None]
                state = torch.where(forgets, 0, state) * decay[:, t, :, :, None]
                written = beta[:, t, :, None] * v[:, t]
                state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
                outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return Recurrent(torch.stack(outputs, dim=1).to(dtype), state)


class ChunkedDecayedSum(DecayedSum):
    """Chunks of 64 tokens as matrix products, chained by one decay per chunk.

    The backward keeps the inputs and one state per segment, and computes the rest again, a segment
    at a time: memory beside the inputs does not grow with the length.
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
        grid = Grid(info.starts, self.chunk, self.segment * self.chunk)
        with full_precision(q):
            inputs = tuple(widen(x) for x in (q, k, v, log_decay, beta))
            state = entering(initial_state, inputs[1], inputs[2])
            output, final = _Chunked.apply(*inputs, state, grid)
        return Recurrent(output.to(v.dtype), final)


def _segment(inputs: Inputs, documents: Documents | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Output [X, C, V] and the state after the last chunk, from the one before the first,
    [batch x heads, K, V]; differentiable."""
    q, k, v, log_decay, beta = inputs
    decay = ScalarDecay(log_decay)
    between, prefix, suffix = decay.between, decay.prefix, decay.suffix
    if documents is not None:
        between = between * documents.same
        prefix, suffix = prefix * documents.from_start, suffix * documents.to_end
    values = beta * v
    updates = ((k * suffix).mT @ values).unflatten(0, (-1, state.shape[0]))
    through = prefix[:, -1:].unflatten(0, (-1, state.shape[0]))  # [n, batch x heads, 1, 1]
    before = []
    for decayed, update in zip(through.unbind(0), updates.unbind(0), strict=True):
        before.append(state)
        state = torch.addcmul(update, decayed, state)
    within = ((q @ k.mT) * between) @ values
    return torch.baddbmm(within, q * prefix, torch.cat(before)), state


class _Chunked(torch.autograd.Function):
    """Segment after segment; the backward in reverse, each segment computed again."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, state, grid):
        inputs = (q, k, v, log_decay, beta)
        (batch, _, heads, _), outputs, before = q.shape, [], []
        ctx.grid, ctx.shape = grid, state.shape
        state = state.flatten(0, 1)
        for part in grid.parts():
            before.append(state)
            output, state = _segment(*grid.cut(inputs, part), state)
            outputs.append(join(output, batch, heads, part.stop - part.start))
        ctx.save_for_backward(*inputs, *before)
        return torch.cat(outputs, dim=1), state.view(ctx.shape)

    @staticmethod
    def backward(ctx, grad_output, grad_state):
        saved = ctx.saved_tensors  # read once: a checkpointed layer gives them no second time
        inputs, before = saved[:5], saved[5:]
        batch, _, heads, _ = grad_output.shape
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:5]) if needed]
        grads = {i: torch.empty_like(inputs[i]) for i in wanted}
        grad_state = grad_state.flatten(0, 1)
        for part, state in zip(reversed(ctx.grid.parts()), reversed(before), strict=True):
            pieces, documents = ctx.grid.cut(inputs, part)
            leaves = [x.detach().requires_grad_() for x in (*pieces, state)]
            with torch.enable_grad():
                results = _segment(Inputs(*leaves[:-1]), documents, leaves[-1])
            given = cut(grad_output[:, part], ctx.grid.chunk), grad_state
            *found, grad_state = torch.autograd.grad(
                results, [*(leaves[i] for i in wanted), leaves[-1]], given
            )
            for grad, piece in zip(grads.values(), found, strict=True):
                piece = join(piece, batch, heads, part.stop - part.start)
                grad[:, part] = piece if grad.dim() == 4 else piece.squeeze(-1)
        return *map(grads.get, range(5)), grad_state.view(ctx.shape), None
