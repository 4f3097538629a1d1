"""The recurrence contract: what it promises beside forward, for every kind of transition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.decayed_sum import ChunkedDecayedSum, DecayedSum, TokenLoopDecayedSum
from models.ops.delta_rule import ChunkedDeltaRule, TokenLoopDeltaRule
from models.sequence import LinearRecurrence, SequenceInfo
from tests.helpers import assert_equal, outputs_and_gradients, random_tensors
from tests.models.ops.synthetic import DecayedWrites, ScalarDecay

HEADS, KEY, VALUE = 3, 4, 5
INFOS = {
    "continued": SequenceInfo.span(2, 7, 97),
    "one token": SequenceInfo.span(2, 7, 8),
    "documents": SequenceInfo.from_lengths([[3, 60, 27], [90]]),
    **{f"{seq} tokens": SequenceInfo.span(1, 7, 7 + seq) for seq in (63, 64, 65)},
}


def small_chunks() -> ChunkedDeltaRule:
    op = ChunkedDeltaRule()
    op.chunk, op.segment = 8, 3  # several segments, the last neither whole nor of whole chunks
    return op


OPS: dict[str, LinearRecurrence] = {
    "token loop": TokenLoopDeltaRule(),
    "chunked": ChunkedDeltaRule(),
    "small chunks": small_chunks(),
    "decayed sum, token loop": TokenLoopDecayedSum(),
    "decayed sum, chunked": ChunkedDecayedSum(),
    "diagonal": DecayedWrites(),
    "scalar": ScalarDecay(),
}


def inputs(op: LinearRecurrence, info: SequenceInfo) -> list[Tensor]:
    """q, k, v, log_decay, beta, state; some heads keep their state and others lose it."""
    batch, seq = info.shape
    key, value = (batch, seq, HEADS, KEY), (batch, seq, HEADS, VALUE)
    gate = (*key[:3], 1) if isinstance(op, DecayedSum) else key
    shapes = key, key, value, gate, key[:3], (batch, HEADS, KEY, VALUE)
    q, k, v, gate, beta, state = random_tensors(*shapes)
    speed = torch.tensor([0.0, 0.1, 20.0], dtype=torch.float64)[:, None]
    return [q, F.normalize(k, dim=-1), v, -gate.sigmoid() * speed, beta.sigmoid(), state]


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_state_may_enter_later(op, info):
    check_later(op, info)


def test_a_state_may_enter_several_whole_segments_later():
    check_later(ChunkedDeltaRule(), SequenceInfo.span(1, 7, 7 + 2 * 1024 + 1))


def check_later(op: LinearRecurrence, info: SequenceInfo) -> None:
    def later(*tensors: Tensor):
        *tokens, state = tensors
        return op.response(*tokens, info).enter(state)

    def first(*tensors: Tensor):
        *tokens, state = tensors
        return op(*tokens, info, initial_state=state)

    tensors = inputs(op, info)
    got, expected = (outputs_and_gradients(way, tensors) for way in (later, first))
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_response_is_affine_in_the_state(op, info):
    *tokens, state = inputs(op, info)
    results = op(*tokens, info, initial_state=state)
    grads = random_tensors(*(x.shape for x in results))
    (expected,) = torch.autograd.grad(results, state, grads)

    reads, transition, update, enter = op.response(*tokens, info)
    assert isinstance(transition, op.transition)
    assert transition.tensor.shape[2:] == op.transition.shape(KEY)
    assert not any(x.requires_grad for x in (reads, transition.tensor, update))
    output = enter(torch.zeros_like(state)).output + torch.einsum("bthk,bhkv->bthv", reads, state)
    assert_equal([output, transition.apply(state) + update], results, 1e-12)
    got = torch.einsum("bthk,bthv->bhkv", reads, grads[0]) + transition.adjoint(grads[1])
    assert_equal([got], [expected], 1e-12)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_summaries_compose_to_that_of_the_whole(op):
    *tokens, _ = inputs(op, SequenceInfo.span(2, 7, 97))

    def summary(start: int, stop: int):
        info = SequenceInfo.span(2, 7 + start, 7 + stop)
        response = op.response(*(x[:, start:stop] for x in tokens), info)
        return response.transition, response.update

    (first, written), (second, later), (whole, update) = map(summary, (0, 31, 0), (31, 90, 90))
    got = [second.compose(first).tensor, second.apply(written) + later]
    assert_equal(got, [whole.tensor, update], 1e-11)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_adjoint_is_the_transpose(op):
    *tokens, state = inputs(op, SequenceInfo.span(2, 7, 97))
    _, transition, update, _ = op.response(*tokens, SequenceInfo.span(2, 7, 97))
    left = (transition.apply(state) * update).sum()
    assert_equal([left], [(state * transition.adjoint(update)).sum()], 1e-12)
