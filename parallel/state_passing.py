"""Context parallelism for linear recurrences: summaries of segments travel, not tokens.

A segment maps the state S that enters it to T S + U, so the ranks that hold a cut document hand
each other (T, U): as many bytes at any length. LASP-2, arXiv 2502.07563, with the dense transitions
of the delta rule; backward only the gradients of states travel. The op's `response` gives (T, U),
and what S adds to the outputs once it has come: no token is gone over twice.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops.runs import runs
from models.precision import full_precision, widen
from models.sequence import (
    LinearRecurrence,
    Peers,
    Recurrent,
    Response,
    SequenceInfo,
    per_layout,
)
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


@per_layout
def segments(peers: Peers, rank: int) -> tuple[Segment, ...]:
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
    lies; above, they are combined by a parallel scan. First run the segments that others follow, as
    their summaries are due. While these travel the segments that none follows run as far as they
    can without a state, and every other stretch of whole documents; the backward of the remaining
    stretches runs while the gradients travel.

    final_state is that of the last local token. gates: further tensors of `op` by token and head.
    Raises ValueError for an initial state.
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
        **gates: Tensor | None,
    ) -> Recurrent:
        _refuse(initial_state)
        tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta} | _given(gates)
        rank = place_on(self.axis, info)
        if rank is None:
            return self.op(**tensors, info=info)
        plan = segments(info.peers, rank)
        local = _Local(self.op, plan, tensors, info)
        chain = self._chain(info.peers, k, v)
        leaving = [s for s in plan if not s.last]
        between = [s for s in leaving if s.entered]
        ends = [s for s in plan if s.entered and s.last]
        whole = [s for s in plan if s.link is None]

        local.run(s for s in leaving if not s.entered)
        local.respond(between)
        chain.start({s.link: local.summary(s) for s in leaving if s.link})
        local.run(whole[::2])
        local.respond(ends)
        with full_precision(q):
            states, kept = chain.states()
        local.enter(between, states)
        # Autograd runs backwards what follows while the gradients of states are on their way.
        finals = [local.results[s].final_state for s in leaving]
        gate = _Leaving.apply(chain, [s.link for s in leaving], *finals)
        local.enter(ends, states)
        local.run(whole[1::2])

        output = torch.cat([local.results[s].output for s in plan], dim=1)
        final = local.results[plan[-1]].final_state
        back = _Back(chain, tuple(local.responses), tuple(kept))
        responses = local.responses.values()
        reads, through = [r.reads for r in responses], [r.transition.tensor for r in responses]
        return Recurrent(
            *_Entering.apply(back, gate, output, final, *reads, *through, *kept.values())
        )

    def _chain(self, peers: Peers, k: Tensor, v: Tensor) -> Chain:
        shape = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])
        post = Post(self.axis, self.op.transition, widen(k.new_empty(1)).expand(shape))
        return Scan(post, peers) if self.axis.ranks > self.scan_ranks else Gather(post, peers)


class UlyssesRecurrence(LinearRecurrence):
    """`op` on all tokens of the axis for a share of the heads: bitwise what one rank computes.
    Where no document is cut it runs on the local row, and nothing is sent.

    op: a local one, or `StatePassing` over the groups that the axes of this kind form. final_state
    is that of the own heads after the last token of the group. gates: further tensors of `op` by
    token and head. Raises ValueError for an initial state and for more ranks than heads.
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
        **gates: Tensor | None,
    ) -> Recurrent:
        _refuse(initial_state)
        own_rank(info)
        by_head = {"beta": beta} | _given(gates)
        if not chains(info.peers):
            return self.op(q, k, v, log_decay, info=info, **by_head)
        exchange = HeadExchange(self.axis, info, heads=q.shape[2], op="recurrence")
        exchange.check_inner(self.op, StatePassing)
        numbers = [x.unsqueeze(-1) for x in by_head.values()]
        q, k, v, log_decay, *numbers = exchange.to_heads(q, k, v, log_decay, *numbers)
        by_head = {name: x.squeeze(-1) for name, x in zip(by_head, numbers, strict=True)}
        output, final = self.op(q, k, v, log_decay, info=exchange.info, **by_head)
        return Recurrent(exchange.to_tokens(output), final)


def _given(gates: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: gate for name, gate in gates.items() if gate is not None}


def _refuse(initial_state: Tensor | None) -> None:
    if initial_state is not None:
        raise ValueError(
            "initial_state under context parallelism; a sequence on several ranks starts at its "
            "first token"
        )


class _Local:
    """The segments of this rank's row, and what the op made of those that have run."""

    def __init__(
        self,
        op: LinearRecurrence,
        plan: tuple[Segment, ...],
        tensors: dict[str, Tensor],
        info: SequenceInfo,
    ) -> None:
        self.op, device = op, info.index.device
        # Not sliced: the gradient of every slice would be as long as the row.
        lengths = [segment.stop - segment.start for segment in plan]
        pieces = [x.split(lengths, dim=1) if len(plan) > 1 else (x,) for x in tensors.values()]
        self.arguments: dict[Segment, dict[str, Any]] = {
            segment: dict(
                zip(tensors, parts, strict=True), info=row_info(info.peers, segment.row, device)
            )
            for segment, parts in zip(plan, zip(*pieces, strict=True), strict=True)
        }
        self.responses: dict[Segment, Response] = {}
        self.results: dict[Segment, Recurrent] = {}

    def run(self, chosen: Iterable[Segment]) -> None:
        for segment in chosen:
            self.results[segment] = self.op(**self.arguments[segment])

    def respond(self, chosen: Iterable[Segment]) -> None:
        for segment in chosen:
            self.responses[segment] = self.op.response(**self.arguments[segment])

    def enter(self, chosen: Iterable[Segment], states: dict[Link, Tensor]) -> None:
        for segment in chosen:
            assert segment.link is not None
            self.results[segment] = self.responses[segment].enter(states[segment.link])

    def summary(self, segment: Segment) -> Summary:
        """Without gradients: those of states come from the ranks that hold later segments."""
        if segment.entered:
            response = self.responses[segment]
            return Summary(response.transition, response.update)
        return Summary(None, self.results[segment].final_state.detach())


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

    chain: Chain
    entered: tuple[Segment, ...]
    kept: tuple[tuple, ...]  # keys


class _Entering(torch.autograd.Function):
    """Returns output and final state as they are; its backward comes before that of every
    segment, and sends the gradients of the states that entered some.

    tensors: the reads of these segments, their transitions, and what the chain kept.
    """

    @staticmethod
    def forward(ctx: Any, back: _Back, gate: Tensor, output: Tensor, final: Tensor, *tensors):
        ctx.back, ctx.seq = back, output.shape[1]
        ctx.save_for_backward(*tensors)
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_final: Tensor):
        chain, entered = ctx.back.chain, ctx.back.entered
        count = len(entered)
        tensors = ctx.saved_tensors
        reads, through, kept = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        grads = {}
        with full_precision(grad_output):
            for segment, read, transition in zip(entered, reads, through, strict=True):
                grad = widen(grad_output[:, segment.tokens])
                grads[segment.link] = torch.einsum("bthk,bthv->bhkv", widen(read), grad)
                if segment.stop == ctx.seq:
                    grads[segment.link] += chain.post.kind(transition).adjoint(grad_final)
            chain.start_back(grads, dict(zip(ctx.back.kept, kept, strict=True)))
        if not ctx.needs_input_grad[1]:  # no segment here waits for a gradient
            chain.gradients()
        gate = torch.zeros_like(grad_final[:0, 0, 0, 0])
        return None, gate, grad_output, grad_final, *[None] * len(tensors)
