"""Recurrences over several ranks against one rank: states, gradients, bytes, order of messages."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partialmethod
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.ops.decayed_sum import ChunkedDecayedSum, TokenLoopDecayedSum
from models.ops.delta_rule import ChunkedDeltaRule, TokenLoopDeltaRule
from models.sequence import Fragment, LinearRecurrence, Recurrent, Response, SequenceInfo
from models.transition import DenseTransition
from parallel import chains
from parallel.collectives import Axis, Pending, Traffic
from parallel.state_passing import StatePassing, UlyssesRecurrence
from tests.models.ops.synthetic import DecayedWrites, ScalarDecay
from tests.parallel.layouts import (
    Row,
    cases,
    contiguous,
    local,
    place,
    random_heads,
    rank_info,
    whole,
    zigzag,
)
from tests.parallel.ranks import on_ranks
from tests.parallel.test_softmax_schemes import two_axes

HEADS, KEY, VALUE = 4, 4, 3


def chunked() -> ChunkedDeltaRule:
    op = ChunkedDeltaRule()
    op.chunk, op.segment = 4, 2  # several segments in a few tokens
    return op


def decayed_sum() -> ChunkedDecayedSum:
    op = ChunkedDecayedSum()
    op.chunk, op.segment = 4, 2
    return op


OPS = {  # fast form, definition, decays per head
    "delta rule": (chunked, TokenLoopDeltaRule, KEY),
    "delta rule, one decay": (chunked, TokenLoopDeltaRule, 1),
    "decayed sum": (decayed_sum, TokenLoopDecayedSum, 1),
    "diagonal": (DecayedWrites, DecayedWrites, KEY),
    "scalar": (ScalarDecay, ScalarDecay, KEY),
}
SCHEMES: dict[str, Callable[[LinearRecurrence, Axis], LinearRecurrence]] = {
    "gather": lambda op, axis: StatePassing(op, axis=axis),
    "scan": lambda op, axis: StatePassing(op, axis=axis, scan_ranks=0),
    "ulysses": lambda op, axis: UlyssesRecurrence(op, axis=axis),
}


def inputs(
    peers: tuple[Row, ...],
    dtype: torch.dtype = torch.float64,
    dims: tuple[int, int] = (KEY, VALUE),
    decays: int | None = None,
) -> list[Tensor]:
    """q, k, v, log_decay, beta and a weight of the output; decays of -20 to 0, by head, as many as
    key channels unless given."""
    key, value = ((HEADS, dim) for dim in dims)
    shapes = [key, key, value, (HEADS, decays or dims[0]), (HEADS,), value]
    q, k, v, gate, beta, weight = random_heads(peers, shapes)
    slowest = torch.tensor([0.0, -1e-3, -1.0, -20.0], dtype=gate.dtype).unsqueeze(-1)
    tensors = [q, F.normalize(k, dim=-1), v, gate.sigmoid() * slowest, beta.sigmoid(), weight]
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def clip(row: Iterable[Fragment], start: int, stop: int) -> SequenceInfo:
    """Tokens start..stop of the packed global sequence."""
    fragments = []
    for f in row:
        first, end = max(f.index, start), min(f.index + f.length, stop)
        if first < end:
            at = f.position + first - f.index
            fragments.append(replace(f, length=end - first, index=first, position=at))
    return SequenceInfo.from_fragments([fragments])


@functools.cache
def alone(
    definition: type[LinearRecurrence], decays: int, peers: tuple[Row, ...], *, states: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of one rank, and the state after the last token of each rank; states:
    whether the loss has those too."""
    *tokens, weight = inputs(peers, decays=decays)
    output, lasts = on_one_rank(definition(), peers, tokens)
    loss = (output * weight).sum()
    if states:
        loss = loss + sum((i + 1) * state.sin().sum() for i, state in enumerate(lasts))
    return [output, *torch.autograd.grad(loss, tokens)], lasts


def on_one_rank(op: LinearRecurrence, peers: tuple[Row, ...], tokens: list[Tensor]):
    """Output of the whole sequence, and the state after the last token of each rank."""
    lasts = [row[-1].index + row[-1].length for row in peers]
    (row,) = whole(peers).fragments
    outputs, states, start, state = [], {}, 0, None
    for stop in sorted({*lasts, tokens[0].shape[1]}):
        parts = (x[:, start:stop] for x in tokens)
        result = op(*parts, clip(row, start, stop), initial_state=state)
        outputs.append(result.output)
        start, state = stop, result.final_state
        states[stop] = state
    return torch.cat(outputs, dim=1), [states[last] for last in lasts]


def errors(
    build: Callable[[LinearRecurrence, Axis], LinearRecurrence],
    ops: tuple[Callable[[], LinearRecurrence], type[LinearRecurrence], int],
    peers: tuple[Row, ...],
    axis: Axis,
) -> float:
    """Largest difference of outputs, final state and every gradient, relative to the largest."""
    fast, definition, decays = ops
    *tokens, weight = inputs(peers, decays=decays)
    scheme, info = build(fast(), axis), rank_info(peers, axis.rank)
    passes = isinstance(scheme, StatePassing)
    expected, states = alone(definition, decays, peers, states=passes)
    own = [local(x, info) for x in tokens]
    result = scheme(*own, info)

    loss, pairs = (result.output * local(weight, info)).sum(), []
    if passes:
        pairs.append((result.final_state, states[axis.rank]))
        loss = loss + (axis.rank + 1) * result.final_state.sin().sum()
    got = [result.output, *torch.autograd.grad(loss, own)]
    pairs += [(x, y[:, info.index[0]]) for x, y in zip(got, expected, strict=True)]
    largest = [*(y for _, y in pairs[: -len(got)]), *expected]
    assert all(x.isfinite().all() for x, _ in pairs)
    return max(
        ((x - y).abs().amax() / z.abs().amax().clamp(min=1e-6)).item()
        for (x, y), z in zip(pairs, largest, strict=True)
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_schemes_equal_one_rank(ranks):
    on_ranks(ranks, check_schemes)


def check_schemes(axis: Axis) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for i, (case, peers) in enumerate(cases(axis.ranks)):
        if axis.ranks > 2 and (i + axis.ranks) % 2:
            continue  # three and four ranks have one half each
        op = list(OPS)[i % len(OPS)]
        for scheme in SCHEMES:
            error = errors(SCHEMES[scheme], OPS[op], peers, axis)
            assert error < 1e-10, (case, op, scheme, error)
            moved = axis.traffic.take()
            assert chains.chains(peers) or not moved, case


def test_two_levels_equal_one_rank():
    on_ranks(4, check_two_levels)


def check_two_levels(axis: Axis) -> None:
    ulysses, ring = two_axes(axis, 2)
    for case, peers in list(cases(4))[::2]:
        build = lambda op, _: UlyssesRecurrence(StatePassing(op, axis=ring), axis=ulysses)  # noqa: E731
        assert errors(build, OPS["delta rule"], peers, axis) < 1e-10, case


def test_ulysses_is_bitwise_one_rank():
    on_ranks(2, check_bitwise)


def check_bitwise(axis: Axis) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for case, peers in cases(axis.ranks):
            if not chains.chains(peers):
                continue  # runs on shorter rows, and on another grid of chunks
            # Head dims of whole cache lines: matrix libraries choose their loops by alignment.
            *tokens, weight = inputs(peers, dtype, (32, 16))
            info, op = rank_info(peers, axis.rank), ChunkedDeltaRule()
            output = op(*tokens, whole(peers)).output
            expected = [output, *torch.autograd.grad((output * weight).sum(), tokens)]
            own = [local(x, info) for x in tokens]
            output = UlyssesRecurrence(op, axis=axis)(*own, info).output
            grads = torch.autograd.grad((output * local(weight, info)).sum(), own)
            for x, y in zip([output, *grads], expected, strict=True):
                assert torch.equal(x, y[:, info.index[0]]), (case, dtype)


def test_bfloat16_under_autocast_passes_fp32_states():
    on_ranks(3, check_bfloat16)


def check_bfloat16(axis: Axis) -> None:
    """At most twice the error that one rank makes."""
    peers = place([5, 40, 3], zigzag(3, 16))
    *wide, weight = inputs(peers)
    exact = TokenLoopDeltaRule()(*wide, whole(peers)).output
    exact_grads = torch.autograd.grad((exact * weight).sum(), wide)
    *tokens, weight = (x.detach().bfloat16().requires_grad_() for x in (*wide, weight))
    info = rank_info(peers, axis.rank)
    with torch.autocast("cpu", torch.bfloat16):
        output = chunked()(*tokens, whole(peers)).output
        own = [local(x, info) for x in tokens]
        result = StatePassing(chunked(), axis=axis)(*own, info)
    grads = torch.autograd.grad((output * weight).sum(), tokens)
    own_grads = torch.autograd.grad((result.output * local(weight, info)).sum(), own)
    assert result.final_state.dtype == torch.float32
    for x, y, z in zip(
        (result.output, *own_grads), (output, *grads), (exact, *exact_grads), strict=True
    ):
        assert x.dtype == torch.bfloat16
        error = (y - z).abs().amax()
        assert (x - z[:, info.index[0]]).abs().amax() <= 2 * error


def test_bytes_do_not_depend_on_the_length():
    on_ranks(4, check_bytes)


def check_bytes(axis: Axis) -> None:
    """Each fragment's summary goes once to every rank that holds a later one, its gradient back."""
    state, dense = HEADS * KEY * VALUE, HEADS * KEY * KEY
    kinds = (
        *((chunked, dense, KEY), (chunked, dense, 1)),
        *((DecayedWrites, HEADS * KEY, KEY), (decayed_sum, HEADS, 1)),
    )
    for fast, through, decays in kinds:
        for dtype, size in ((torch.float64, 8), (torch.float32, 4)):
            for n in (8, 32):
                # Rank 3 holds the two chunks in the middle: one run.
                held = [0, 1, 2, 3, 2, 1, 0]
                last = max(i for i, rank in enumerate(held) if rank == axis.rank)
                forward = backward = 0
                for i, rank in enumerate(held):
                    if rank != axis.rank and i < last:
                        forward += size * (state + (through if i else 0))
                    elif rank == axis.rank:
                        backward += size * state * len(set(held[i + 1 :]) - {rank})
                peers = place([4 * n], zigzag(4, n))
                assert traffic(fast(), axis, peers, dtype, decays) == {
                    ("all_to_all", "recurrence", "forward"): forward,
                    ("all_to_all", "recurrence", "backward"): backward,
                }
    # Documents that no cut crosses, and on every rank another number of them.
    peers = place([8, 3, 5, 8, 1, 1, 6], contiguous(4, 8))
    assert not traffic(chunked(), axis, peers, torch.float32, KEY)


def traffic(
    op: LinearRecurrence, axis: Axis, peers: tuple[Row, ...], dtype: torch.dtype, decays: int
) -> dict:
    *tokens, _ = inputs(peers, dtype, decays=decays)
    info = rank_info(peers, axis.rank)
    StatePassing(op, axis=axis)(*(local(x, info) for x in tokens), info).output.sum().backward()
    return dict(axis.traffic.take())


class Noted(LinearRecurrence):
    """Writes into the trace which documents it runs, forward and backward."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.op, self.traffic = DecayedWrites(), axis.traffic
        self.transition = self.op.transition

    def forward(self, q, k, v, log_decay, beta, info, *, initial_state=None) -> Recurrent:
        started = " ".join(str(f.start) for f in info.fragments[0])
        self.traffic.note("run", started)
        v = v.view_as(v)
        v.register_hook(lambda _: self.traffic.note("run back", started))
        return self.op(q, k, v, log_decay, beta, info, initial_state=initial_state)

    def response(self, q, k, v, log_decay, beta, info) -> Response:
        started = " ".join(str(f.start) for f in info.fragments[0])
        self.traffic.note("respond", started)
        response = self.op.response(q, k, v, log_decay, beta, info)

        def enter(state: Tensor) -> Recurrent:
            return self(q, k, v, log_decay, beta, info, initial_state=state)

        return response._replace(enter=enter)


def trace(axis: Axis) -> list[tuple[str, str]]:
    """The document at 4 is cut; rank 0 holds whole ones on both sides of its first part."""
    peers = place([4, 8, 4, 8], [[(0, 8), (12, 16)], [(8, 12), (16, 24)]])
    *tokens, _ = inputs(peers)
    info = rank_info(peers, axis.rank)
    axis.traffic.trace = found = []
    output = StatePassing(Noted(axis), axis=axis)(*(local(x, info) for x in tokens), info).output
    output.sum().backward()
    return [(event, subject.removeprefix("recurrence all_to_all ")) for event, subject in found]


EXPECTED_TRACE = [
    [
        *[("run", "4"), ("post", "forward"), ("run", "0"), ("wait", "forward"), ("run", "12")],
        *[("post", "backward"), ("run back", "12"), ("wait", "backward")],
        *[("run back", "0"), ("run back", "4")],
    ],
    [
        *[("post", "forward"), ("run", "16"), ("respond", "4"), ("wait", "forward"), ("run", "4")],
        *[("post", "backward"), ("wait", "backward"), ("run back", "4"), ("run back", "16")],
    ],
]


def test_local_work_runs_while_messages_travel():
    on_ranks(2, check_trace)


def check_trace(axis: Axis) -> None:
    assert trace(axis) == EXPECTED_TRACE[axis.rank]
    exchange = Axis.exchange

    def at_once(*args, **kwargs) -> Pending:
        pending = exchange(*args, **kwargs)
        return Pending(pending.wait(), [], axis.traffic, "late")

    with patch.object(Axis, "exchange", at_once):
        assert trace(axis) != EXPECTED_TRACE[axis.rank]


def test_checkpointing_runs_it_again():
    on_ranks(3, check_checkpoint)


def check_checkpoint(axis: Axis) -> None:
    peers = place([5, 21, 3, 7], zigzag(3, 12))
    *tokens, _ = inputs(peers)
    info, scheme = rank_info(peers, axis.rank), StatePassing(chunked(), axis=axis)
    found = []
    for again in (False, True):
        own = [local(x, info) for x in tokens]

        def run(*own: Tensor) -> Tensor:
            return scheme(*own, info).output.tanh()

        output = checkpoint(run, *own, use_reentrant=False) if again else run(*own)
        found.append([output, *torch.autograd.grad(output.square().sum(), own)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def gradients(self: chains.Chain, factor: float) -> dict:
    return {link: factor * grad for link, (_, grad) in self._arrived()}


def without_reads(self: ChunkedDeltaRule, **tokens) -> Response:
    response = RESPONSE(self, **tokens)
    return response._replace(reads=torch.zeros_like(response.reads))


RESPONSE = ChunkedDeltaRule.response
MUTATIONS = {
    "no reads": (ChunkedDeltaRule, "response", without_reads),
    "dropped hop": (DenseTransition, "apply", lambda self, state: torch.zeros_like(state)),
    "not transposed": (DenseTransition, "adjoint", lambda self, grad: self.tensor @ grad),
    "wrong order": (
        *(DenseTransition, "compose"),
        lambda self, earlier: DenseTransition(earlier.tensor @ self.tensor),
    ),
    "no gradient": (chains.Chain, "gradients", partialmethod(gradients, factor=0.0)),
    "double gradient": (chains.Chain, "gradients", partialmethod(gradients, factor=2.0)),
}


def test_mutations_are_found():
    on_ranks(3, check_mutations)


def check_mutations(axis: Axis) -> None:
    peers = place([3, 30, 3], zigzag(3, 12))
    for mutation, change in MUTATIONS.items():
        for scheme in ("gather", "scan"):
            if mutation == "wrong order" and scheme == "gather":
                continue  # composes nothing
            with patch.object(*change):
                error = torch.tensor(errors(SCHEMES[scheme], OPS["delta rule"], peers, axis))
            dist.all_reduce(error, dist.ReduceOp.MAX)
            assert error > 1e-4, (mutation, scheme)


def test_bad_input():
    peers = place([12], zigzag(2, 6))
    *tokens, _ = inputs(peers)
    info, axis = rank_info(peers, 0), Axis(None, 0, 2, Traffic())  # type: ignore[arg-type]
    own = [local(x, info) for x in tokens]
    state = torch.zeros(1, HEADS, KEY, VALUE, dtype=torch.float64)
    for scheme in (StatePassing(chunked(), axis=axis), UlyssesRecurrence(chunked(), axis=axis)):
        with pytest.raises(ValueError, match="initial_state"):
            scheme(*own, info, initial_state=state)
        with pytest.raises(ValueError, match="peers"):
            scheme(*own, SequenceInfo.from_fragments([peers[0]]))
        gap = (peers[0], tuple(replace(f, length=f.length - 1) for f in peers[1]))
        with pytest.raises(ValueError, match="goes on at position"):
            scheme(*own, rank_info(gap, 0))
    with pytest.raises(ValueError, match="rank 1 of 2"):
        StatePassing(chunked(), axis=replace(axis, rank=1))(*own, info)
    four = place([24], contiguous(4, 6))
    *tokens, _ = inputs(four)
    info = rank_info(four, 0)
    with pytest.raises(ValueError, match="ChunkedDeltaRule inside ulysses=2 of 4 context ranks"):
        UlyssesRecurrence(chunked(), axis=axis)(*(local(x, info) for x in tokens), info)
