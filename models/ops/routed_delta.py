"""The gated delta rule with writes gated chunk by chunk: the linear half of token-level routing.

NAtS-L, arXiv 2602.03681. `TokenLoopRoutedDelta` is the definition. `ChunkedRoutedDelta` lays every
document on a grid of chunks, and a gate scales what a chunk adds to the state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.chunks import Documents, Inputs, cut, entering
from models.ops.delta_chunk import Segment
from models.ops.delta_rule import Work, recur, respond
from models.ops.routed import RoutedRecurrence
from models.ops.routed_grid import ChunkGrid, chunk_grid
from models.precision import full_precision, widen
from models.sequence import Recurrent, Response, SequenceInfo

SEGMENT = 1024  # tokens, of which the work is done, and in the backward done again, at a time


class TokenLoopRoutedDelta(RoutedRecurrence):
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
        write: Tensor | None = None,
    ) -> Recurrent:
        dtype = v.dtype
        with full_precision(q):
            q, k, v, decay, beta = widen(q), widen(k), widen(v), widen(log_decay).exp(), widen(beta)
            writes = torch.ones_like(beta) if write is None else widen(write)
            # Of three states of a chunk one is written to, two are what entered, one of them as a
            # query without own chunk reads it, the other as a chunk without writes leaves it.
            state = decayed = kept = entering(initial_state, k, v)
            gate, starts = writes[:, 0], info.starts
            outputs = []
            for t in range(q.shape[1]):
                forgets = starts[:, t, None, None, None]
                opens = forgets | (info.positions[:, t] % self.chunk == 0)[:, None, None, None]
                left = torch.where(forgets, 0, _commit(state, kept, gate))
                state, decayed, kept = (torch.where(opens, left, x) for x in (state, decayed, kept))
                gate = torch.where(opens[..., 0, 0], writes[:, t], gate)
                state, decayed = state * decay[:, t, :, :, None], decayed * decay[:, t, :, :, None]
                kept = decayed if self.decays else kept
                predicted = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
                error = beta[:, t, :, None] * (v[:, t] - predicted)
                state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
                read = state if self.own else decayed
                outputs.append(torch.einsum("bhkv,bhk->bhv", read, q[:, t]))
        return Recurrent(torch.stack(outputs, dim=1).to(dtype), _commit(state, kept, gate))


def _commit(state: Tensor, kept: Tensor, gate: Tensor) -> Tensor:
    return kept + gate[:, :, None, None] * (state - kept)


class ChunkedRoutedDelta(RoutedRecurrence):
    """Chunks as matrix products, chained by one affine map per chunk, as `ChunkedDeltaRule`."""

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
        write: Tensor | None = None,
    ) -> Recurrent:
        grid = chunk_grid(info, self.chunk)
        with full_precision(q):
            inputs = _lay((q, k, v, log_decay, beta), write, grid)
            state = entering(initial_state, inputs[1], inputs[2])
            return _tokens(recur(inputs, self._work(grid), state), grid, v.dtype)

    @torch.compiler.disable
    def response(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
        *,
        write: Tensor | None = None,
    ) -> Response:
        """One pass, to whose results `enter` adds what the state makes of them."""
        grid = chunk_grid(info, self.chunk)
        with full_precision(q):
            inputs = _lay((q, k, v, log_decay, beta), write, grid)
            laid = respond(inputs, self._work(grid))
            reads = _join(laid.reads, grid)

        def enter(state: Tensor) -> Recurrent:
            with full_precision(q):
                return _tokens(laid.enter(state), grid, v.dtype)

        return laid._replace(reads=reads, enter=enter)

    def _work(self, grid: ChunkGrid) -> Work:
        return _RoutedWork(grid, own=self.own, decays=self.decays)


def _lay(tokens: Sequence[Tensor], write: Tensor | None, grid: ChunkGrid) -> list[Tensor]:
    """[batch, chunks x C, ...], fp32 or wider; where there is no gate, one of ones. Zeros where
    there is no token neither read nor write nor decay a state."""
    laid = [grid.cut(widen(x)).flatten(1, 2) for x in tokens]
    if write is None:
        return [*laid, torch.ones_like(laid[-1])]
    return [*laid, grid.cut(widen(write)).flatten(1, 2)]


def _join(x: Tensor, grid: ChunkGrid) -> Tensor:
    return grid.join(x.unflatten(1, (-1, grid.chunk)))


def _tokens(laid: Recurrent, grid: ChunkGrid, dtype: torch.dtype) -> Recurrent:
    return Recurrent(_join(laid.output, grid).to(dtype), laid.final_state)


@dataclass(frozen=True)
class _RoutedWork:
    """What `Grid` is for tokens that lie on a grid of chunks, with a gate behind their inputs."""

    grid: ChunkGrid
    own: bool
    decays: bool

    @property
    def chunk(self) -> int:
        return self.grid.chunk

    def parts(self) -> list[slice]:
        size = max(1, SEGMENT // self.chunk) * self.chunk
        seq = self.grid.shape[1] * self.chunk
        return [slice(i, min(i + size, seq)) for i in range(0, seq, size)]

    def segment(self, inputs: Sequence[Tensor], part: slice) -> "RoutedSegment":
        *tokens, gate = (cut(x[:, part], self.chunk) for x in inputs)
        documents = self._documents(part, inputs[0].shape[2])
        return RoutedSegment(
            Inputs(*tokens), documents, gate[:, :1], own=self.own, decays=self.decays
        )

    def _documents(self, part: slice, heads: int) -> Documents | None:
        """Starts are at starts of chunks: they empty the decay from what came before."""
        chunks = range(part.start // self.chunk, part.stop // self.chunk)
        if self.grid.fresh_somewhere.isdisjoint(chunks):
            return None
        fresh = self.grid.fresh[:, chunks.start : chunks.stop].T  # [n, batch]
        fresh = fresh.unsqueeze(-1).expand(-1, -1, heads).reshape(-1, 1, 1)
        everywhere = fresh.new_ones(1, 1, 1)
        return Documents(same=everywhere, from_start=~fresh, to_end=everywhere)


class RoutedSegment(Segment):
    """A segment whose chunk leaves E S + gate (M S + B - E S), with E its decay, or 1.

    gate: [X, 1, 1]. own: whether queries see their own chunk.
    """

    def __init__(
        self, inputs: Inputs, documents: Documents | None, gate: Tensor, *, own: bool, decays: bool
    ) -> None:
        super().__init__(inputs, documents)
        self.gate, self.own, self.decays = gate, own, decays
        self.rest = self.through  # E, [X, K] or [X, 1]
        if not decays:
            ones = torch.ones_like(self.through)
            self.rest = ones if documents is None else ones * documents.from_start[:, -1]
        self.transition *= gate
        self.transition.diagonal(dim1=1, dim2=2).add_((1 - gate.squeeze(-1)) * self.rest)
        self.update *= gate
        if not own:
            self.qk.zero_()

    def backward(
        self, states: Tensor, grad_output: Tensor, grad_state: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """As that of a segment, with the gradient of the gate behind those of the inputs, at the
        first token of a chunk."""
        grads, grad_entered = super().backward(states, grad_output, grad_state)
        written = torch.baddbmm(self.u, self.w, states, alpha=-1)
        added = torch.baddbmm(
            (self.through - self.rest).unsqueeze(-1) * states, self.k_out.mT, written
        )
        grad_gate = torch.zeros_like(self.inputs.beta)
        grad_gate[:, 0] = (added * self.grad_after).sum((1, 2)).unsqueeze(-1)
        if self.decays:
            by_channel = (1 - self.gate) * (states * self.grad_after).sum(-1).unsqueeze(1)
            by_channel = by_channel * self.through.unsqueeze(1)
            log_decay = Inputs(*grads).log_decay
            one = log_decay.shape[-1] == 1
            log_decay += by_channel.sum(-1, keepdim=True) if one else by_channel
        return (*grads, grad_gate), grad_entered

    def _states_backward(
        self, grad_output: Tensor, grad_written: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What reaches the chunk's own map: the gradient of the state after it, times the gate."""
        after, entered = super()._states_backward(grad_output, grad_written, grad_state)
        self.grad_after = after
        return after * self.gate, entered
