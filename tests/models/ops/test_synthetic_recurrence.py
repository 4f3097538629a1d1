"""The recurrence contract: what it promises beside forward, for every kind of transition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.delta_rule import ChunkedDeltaRule, TokenLoopDeltaRule
from models.sequence import LinearRecurrence, SequenceInfo
from tests.helpers import assert_equal, random_tensors
from tests.models.ops.synthetic import DecayedWrites, ScalarDecay

HEADS, KEY, VALUE = 3, 4, 5
INFOS = {
    "continued": SequenceInfo.span(2, 7, 97),
    "one token": SequenceInfo.span(2, 7, 8),
    "documents": SequenceInfo.from_lengths([[3, 60, 27], [90]]),
}


def small_chunks() -> ChunkedDeltaRule:
    op = ChunkedDeltaRule()
    op.chunk, op.segment = 8, 3  # several segments, the last neither whole nor of whole chunks
    return op


OPS: dict[str, LinearRecurrence] = {
    "token loop": TokenLoopDeltaRule(),
    "chunked": small_chunks(),
    "diagonal": DecayedWrites(),
    "scalar": ScalarDecay(),
}


def inputs(info: SequenceInfo) -> list[Tensor]:
    """q, k, v, log_decay, beta, state; some heads keep their state and others lose it."""
    batch, seq = info.shape
    key, value = (batch, seq, HEADS, KEY), (batch, seq, HEADS, VALUE)
    shapes = key, key, value, key, key[:3], (batch, HEADS, KEY, VALUE)
    q, k, v, gate, beta, state = random_tensors(*shapes)
    speed = torch.tensor([1e-3, 0.1, 1.0], dtype=torch.float64)[:, None]
    return [q, F.normalize(k, dim=-1), v, -gate.sigmoid() * speed, beta.sigmoid(), state]


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_summary_maps_the_state(op, info):
    q, k, v, log_decay, beta, state = inputs(info)
    final = op(q, k, v, log_decay, beta, info, initial_state=state).final_state
    transition, update = op.summary(k, v, log_decay, beta, info)
    assert isinstance(transition, op.transition)
    assert transition.tensor.shape[2:] == op.transition.shape(KEY)
    assert_equal([transition.apply(state) + update], [final], 1e-12)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_summaries_compose_to_that_of_the_whole(op):
    _, k, v, log_decay, beta, _ = inputs(SequenceInfo.span(2, 7, 97))

    def summary(start: int, stop: int):
        parts = (x[:, start:stop] for x in (k, v, log_decay, beta))
        return op.summary(*parts, SequenceInfo.span(2, 7 + start, 7 + stop))

    (first, written), (second, later), (whole, update) = map(summary, (0, 31, 0), (31, 90, 90))
    got = [second.compose(first).tensor, second.apply(written) + later]
    assert_equal(got, [whole.tensor, update], 1e-12)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_adjoint_is_the_transpose(op):
    _, k, v, log_decay, beta, state = inputs(SequenceInfo.span(2, 7, 97))
    transition, update = op.summary(k, v, log_decay, beta, SequenceInfo.span(2, 7, 97))
    left = (transition.apply(state) * update).sum()
    assert_equal([left], [(state * transition.adjoint(update)).sum()], 1e-12)


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_state_gradient_is_that_of_autograd(op, info):
    *tokens, state = inputs(info)
    results = op(*tokens, info, initial_state=state)
    grads = random_tensors(*(x.shape for x in results))
    (expected,) = torch.autograd.grad(results, state, grads)
    q, k, _, log_decay, beta = (x.detach() for x in tokens)
    with torch.no_grad():  # as inside a backward
        got = op.state_gradient(*(x.detach() for x in grads), q, k, log_decay, beta, info)
    assert_equal([got], [expected], 1e-12)
