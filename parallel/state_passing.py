"""Context parallelism for linear recurrences: summaries of segments travel, not tokens.

A segment maps the state S that enters it to T S + U, so the ranks that hold a cut document hand
each other (T, U): as many bytes at any length. LASP-2, arXiv 2502.07563, with the dense transitions
of the delta rule; backward only the gradients of states travel.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.runs import runs
from models.precision import full_precision, widen
from models.sequence import LinearRecurrence, Recurrent, SequenceInfo
from parallel.chains import Chain, Gather, Link, Post, Scan, Summary, chains, place_on
from parallel.collectives import Axis
from parallel.plans import Row, own_rank, row_info
from parallel.ulysses import HeadExchange


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..stop of a row that one call of the op takes: a link of a chain, or whole
    documents."""

    start: int
    stop: int
    row: Row
    link: Link | None = None
    last: bool = True  # no link follows

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def entered(self) -> bool:
        return self.link is not None and self.link.place > 0


@lru_cache(maxsize=1024)
def segments(peers: tuple[Row, ...], rank: int) -> tuple[Segment, ...]:
    """A rank's row, from left to right."""
    row = peers[rank]
    links = {}
    for document, ranks in chains(peers).items():
        own = sorted((run.position, run.start) for run in runs(row) if run.document == document)
        places = (place for place, holder in enumerate(ranks) if holder == rank)
        for (_, start), place in zip(own, places, strict=True):
            links[start] = Link(document, place), place == len(ranks) - 1
    offsets = [*accumulate((fragment.length for fragment in row), initial=0)]
    found: list[Segment] = []
    for run in runs(row):
        fragments = row[bisect_left(offsets, run.start) : bisect_left(offsets, run.stop)]
        segment = Segment(run.start, run.stop, fragments, *links.get(run.start, ()))
        if found and found[-1].link is None and segment.link is None:
            before = found.pop()
            segment = Segment(before.start, segment.stop, before.row + fragments)
        found.append(segment)
    return tuple(found)


class StatePassing(LinearRecurrence):
    """`op` on every segment of this rank, each from the state that the one before it left.

    Up to `scan_ranks` ranks all summaries of a document are gathered where a later part of it
    lies; above, they are combined by a parallel scan. A first segment has run when its summary is
    due; of the others that summary is computed apart. Every other stretch of whole documents runs
    while the summaries travel, the backward of the rest while the gradients do.

    final_state is that of the last local token. Raises ValueError for an initial state.
    """

    def __init__(self, op: LinearRecurrence, *, axis: Axis, scan_ranks: int = 32) -> None:
        super().__init__()
        self.op, self.axis, self.scan_ranks = op, axis, scan_ranks
        self.transition = op.transition

    # The plans change with every batch: nothing for a compiler to keep.
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
        _refuse(initial_state)
        rank = place_on(self.axis, info)
        if rank is None:
            return self.op(q, k, v, log_decay, beta, info)
        plan = segments(info.peers, rank)
        local = _Local(self.op, (q, k, v, log_decay, beta), info.index.device)
        chain = self._chain(info.peers, k, v)
        leaving = [s for s in plan if not s.last]
        whole = [s for s in plan if s.link is None]

        local.run(s for s in leaving if not s.entered)
        chain.start({s.link: local.summary(s) for s in leaving if s.link})
        local.run(whole[::2])
        with full_precision(q):
            states, kept = chain.states()
        local.run((s for s in leaving if s.entered), states)
        # Autograd runs backwards what follows while the gradients of states are on their way.
        finals = [local.results[s].final_state for s in leaving]
        gate = _Leaving.apply(chain, [s.link for s in leaving], *finals)
        local.run((s for s in plan if s.entered and s.last), states)
        local.run(whole[1::2])

        output = torch.cat([local.results[s].output for s in plan], dim=1)
        final = local.results[plan[-1]].final_state
        entering = _Back(self.op, chain, [s for s in plan if s.entered], tuple(kept))
        return Recurrent(
            *_Entering.apply(entering, gate, output, final, q, k, log_decay, beta, *kept.values())
        )

    def _chain(self, peers: tuple[Row, ...], k: Tensor, v: Tensor) -> Chain:
        shape = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])
        post = Post(self.axis, self.op.transition, widen(k.new_empty(1)).expand(shape))
        return Scan(post, peers) if self.axis.ranks > self.scan_ranks else Gather(post, peers)


class UlyssesRecurrence(LinearRecurrence):
    """`op` on all tokens of the axis for a share of the heads: bitwise what one rank computes.
    Where no document is cut it runs on the local row, and nothing is sent.

    op: a local one, or `StatePassing` over the groups that the axes of this kind form. final_state
    is that of the own heads after the last token of the group. Raises ValueError for an initial
    state and for more ranks than heads.
    """

    def __init__(self, op: LinearRecurrence, *, axis: Axis) -> None:
        super().__init__()
        self.op, self.axis = op, axis
        self.transition = op.transition

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
        _refuse(initial_state)
        own_rank(info)
        if not chains(info.peers):
            return self.op(q, k, v, log_decay, beta, info)
        exchange = HeadExchange(self.axis, info, heads=q.shape[2], op="recurrence")
        exchange.check_inner(self.op, StatePassing)
        *tensors, beta = exchange.to_heads(q, k, v, log_decay, beta.unsqueeze(-1))
        output, final = self.op(*tensors, beta.squeeze(-1), exchange.info)
        return Recurrent(exchange.to_tokens(output), final)


def _refuse(initial_state: Tensor | None) -> None:
    if initial_state is not None:
        raise ValueError(
            "initial_state under context parallelism; a sequence on several ranks starts at its "
            "first token"
        )


class _Local:
    """The segments of this rank's row, and what the op made of those that have run."""

    def __init__(self, op: LinearRecurrence, tensors: tuple[Tensor, ...], device: torch.device):
        self.op, self.tensors, self.device = op, tensors, device
        self.results: dict[Segment, Recurrent] = {}

    def run(self, chosen: Iterable[Segment], states: dict[Link, Tensor] | None = None) -> None:
        for segment in chosen:
            state = states[segment.link] if states and segment.link else None
            parts = (x[:, segment.tokens] for x in self.tensors)
            info = row_info(segment.row, self.device)
            self.results[segment] = self.op(*parts, info, initial_state=state)

    def summary(self, segment: Segment) -> Summary:
        """Without gradients: those of states come from the ranks that hold later segments."""
        if segment in self.results:
            return Summary(None, self.results[segment].final_state.detach())
        _, k, v, log_decay, beta = (x[:, segment.tokens] for x in self.tensors)
        info = row_info(segment.row, self.device)
        with torch.no_grad():
            return Summary(*self.op.summary(k, v, log_decay, beta, info))


class _Leaving(torch.autograd.Function):
    """Hands the states that leave segments to the chain; an empty tensor leads back here."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, links: list[Link], *finals: Tensor) -> Tensor:
        ctx.chain, ctx.links = chain, links
        return chain.post.state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor):
        grads = ctx.chain.gradients()
        return None, None, *(grads[link] for link in ctx.links)


@dataclass(frozen=True)
class _Back:
    """What the backward of `_Entering` needs beside tensors."""

    op: LinearRecurrence
    chain: Chain
    entered: list[Segment]
    kept: tuple[tuple, ...]  # keys


class _Entering(torch.autograd.Function):
    """Returns output and final state as they are; its backward comes before that of every
    segment, and sends the gradients of the states that entered some."""

    @staticmethod
    def forward(ctx: Any, back: _Back, gate: Tensor, output: Tensor, final: Tensor, *tensors):
        ctx.back, ctx.seq = back, output.shape[1]
        ctx.save_for_backward(*tensors)
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_final: Tensor):
        q, k, log_decay, beta, *kept = (x.detach() for x in ctx.saved_tensors)
        op, chain = ctx.back.op, ctx.back.chain
        grads = {}
        for segment in ctx.back.entered:
            parts = (x[:, segment.tokens] for x in (q, k, log_decay, beta))
            grad = grad_final if segment.stop == ctx.seq else torch.zeros_like(grad_final)
            info = row_info(segment.row, q.device)
            grads[segment.link] = op.state_gradient(
                grad_output[:, segment.tokens], grad, *parts, info
            )
        with full_precision(q):
            chain.start_back(grads, dict(zip(ctx.back.kept, kept, strict=True)))
        if not ctx.needs_input_grad[1]:  # no segment here waits for a gradient
            chain.gradients()
        return (
            None,
            torch.zeros_like(grad_final[:0, 0, 0, 0]),
            grad_output,
            grad_final,
            *([None] * (4 + len(kept))),
        )
