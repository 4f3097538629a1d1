"""The gated delta rule with a decay per key channel, KDA, or per head: GDN, DeltaNet.

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t

Kimi Linear, arXiv 2510.26692; WY form of the chunks as in Gated DeltaNet, arXiv 2412.06464.
`TokenLoopDeltaRule` is the definition. `ChunkedDeltaRule` is its fast form in plain PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.ops.chunks import Grid, cut, entering, join
from models.ops.delta_chunk import Segment
from models.precision import full_precision, widen
from models.sequence import LinearRecurrence, Recurrent, Response, SequenceInfo
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
            state, starts = entering(initial_state, k, v), info.starts
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
        with full_precision(q):
            inputs = tuple(widen(x) for x in (q, k, v, log_decay, beta))
            state = entering(initial_state, inputs[1], inputs[2])
            output, final = recur(inputs, self._work(info), state)
        return Recurrent(output.to(v.dtype), final)

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
        """One pass, to whose results `enter` adds what the state makes of them."""
        with full_precision(q):
            inputs = tuple(widen(x) for x in (q, k, v, log_decay, beta))
            response = respond(inputs, self._work(info))

        def enter(state: Tensor) -> Recurrent:
            with full_precision(q):
                output, final = response.enter(state)
            return Recurrent(output.to(v.dtype), final)

        return response._replace(enter=enter)

    def _work(self, info: SequenceInfo) -> "Work":
        return _GridWork(Grid(info.starts, self.chunk, self.segment * self.chunk))


class Work(Protocol):
    """A row as segments of chunks."""

    @property
    def chunk(self) -> int: ...

    def parts(self) -> list[slice]:
        """The tokens of the segments, from left to right."""
        ...

    def segment(self, inputs: Sequence[Tensor], part: slice) -> Segment:
        """inputs: [batch, seq, heads, ...], of which a segment's `backward` gives gradients."""
        ...


class _GridWork(NamedTuple):
    grid: Grid

    @property
    def chunk(self) -> int:
        return self.grid.chunk

    def parts(self) -> list[slice]:
        return self.grid.parts()

    def segment(self, inputs: Sequence[Tensor], part: slice) -> Segment:
        return Segment(*self.grid.cut(inputs, part))


def recur(inputs: Sequence[Tensor], work: Work, state: Tensor) -> Recurrent:
    """From this state, in the dtype of the inputs, which are fp32 or wider."""
    return Recurrent(*_Chunked.apply(work, None, state, *inputs))


def respond(inputs: Sequence[Tensor], work: Work) -> Response:
    with torch.no_grad():
        affine = _Affine.of(inputs, work)

    def enter(state: Tensor) -> Recurrent:
        return Recurrent(*_Chunked.apply(work, affine, state.to(inputs[1]), *inputs))

    through = affine.through[-1].clone()  # not the whole pass
    return Response(affine.reads, DenseTransition(through), affine.written[-1], enter)


def _scan(
    inputs: Sequence[Tensor], work: Work, state: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The output of every segment, the states before them, [segments, *state], and the last one."""
    batch, _, heads, _ = inputs[0].shape
    outputs, before = [], []
    for part in work.parts():
        segment = work.segment(inputs, part)
        before.append(state)
        states, after = segment.states(state.flatten(0, 1))
        outputs.append(join(segment.output(states), batch, heads, part.stop - part.start))
        state = after.view_as(state)
    return outputs, torch.stack(before), state


class _Affine(NamedTuple):
    """A scan from the state [I, 0], of which the columns of I have no values: what comes of these
    is the linear part, what comes of the others the constant one."""

    reads: Tensor  # [batch, seq, heads, key_dim]
    output: Tensor  # [batch, seq, heads, value_dim]
    # Before the segments and after the last one, [segments + 1, batch, heads, key_dim, ...]
    through: Tensor  # ..., key_dim]
    written: Tensor  # ..., value_dim]

    @classmethod
    def of(cls, inputs: Sequence[Tensor], work: Work) -> "_Affine":
        _, k, v, *_ = inputs
        (batch, _, heads, key_dim), value_dim = k.shape, v.shape[3]
        columns = key_dim, value_dim
        eye = torch.eye(key_dim, sum(columns), dtype=k.dtype, device=k.device)
        outputs, before, final = _scan(inputs, work, eye.repeat(batch, heads, 1, 1))
        reads, output = zip(*(x.split(columns, dim=-1) for x in outputs), strict=True)
        states = torch.cat((before, final.unsqueeze(0))).split(columns, dim=-1)
        return cls(torch.cat(reads, dim=1), torch.cat(output, dim=1), *states)

    def enter(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, states before the segments and the last one, from this state."""
        states = self.written + self.through @ state
        output = self.output + torch.einsum("bthk,bhkv->bthv", self.reads, state)
        return output, states[:-1], states[-1]


class _Chunked(torch.autograd.Function):
    """Segment after segment; the backward in reverse, each segment computed again."""

    @staticmethod
    def forward(ctx, work, affine, state, *inputs):
        """affine: of the same inputs and work, where it is known."""
        if affine is None:
            outputs, before, final = _scan(inputs, work, state)
            output = torch.cat(outputs, dim=1)
        else:
            output, before, final = affine.enter(state)
        ctx.work = work
        ctx.save_for_backward(*inputs, before)
        return output, final

    @staticmethod
    def backward(ctx, grad_output, grad_state):
        *inputs, before = ctx.saved_tensors
        work, (batch, _, heads, _) = ctx.work, inputs[0].shape
        grads = [torch.empty_like(x) for x in inputs]
        grad_final = grad_state.flatten(0, 1)
        for part, state in zip(reversed(work.parts()), reversed(before.unbind(0)), strict=True):
            segment = work.segment(inputs, part)
            states, _ = segment.states(state.flatten(0, 1))
            grad = cut(grad_output[:, part], work.chunk)
            segment_grads, grad_final = segment.backward(states, grad, grad_final)
            for grad, piece in zip(grads, segment_grads, strict=True):
                piece = join(piece, batch, heads, part.stop - part.start)
                grad[:, part] = piece if grad.dim() == 4 else piece.squeeze(-1)
        return None, None, grad_final.view_as(grad_state), *grads
