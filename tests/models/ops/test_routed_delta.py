"""The delta rule under gated writes: chunks against the token loop, and that against plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops import routed_delta
from models.ops.delta_rule import TokenLoopDeltaRule
from models.ops.routed_delta import ChunkedRoutedDelta, TokenLoopRoutedDelta
from models.ops.routed_grid import chunk_grid
from models.sequence import Fragment, SequenceInfo
from tests.helpers import assert_equal, outputs_and_gradients, random_tensors

CHUNK, HEADS, KEY, VALUE = 4, 3, 5, 6
INFOS = {
    "a token": SequenceInfo.from_lengths([[1]]),
    "one document": SequenceInfo.from_lengths([[31], [31]]),
    "packed": SequenceInfo.from_lengths([[3, 1, 10, 14], [28], [9, 13]], padding=[0, 0, 6]),
    "continued": SequenceInfo.span(2, 8, 26),
    "scattered": SequenceInfo.from_fragments(
        [
            [Fragment(8, 40, 4), Fragment(7, 100, 64), Fragment(4, 200), Fragment(13, 300, 60)],
            [Fragment(12, 8, 8), Fragment(14, 28, 28), Fragment(6, 90, padding=True)],
        ]
    ),
}
FLAGS = {
    "as published": {},
    "without the own chunk": {"own": False},
    "no decay over what is not written": {"decays": False},
}


def make_inputs(info: SequenceInfo, channels: int, values: tuple[float, ...]) -> list[Tensor]:
    """q, k, v, log_decay, beta, initial state and write; heads, chunks and documents differ."""
    batch, seq = info.shape
    sizes = (KEY,), (KEY,), (VALUE,), (channels,), ()
    q, k, v, decay, beta = random_tensors(*((batch, seq, HEADS, *size) for size in sizes))
    (state,) = random_tensors((batch, HEADS, KEY, VALUE))
    grid = chunk_grid(info, CHUNK)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(len(values), (*grid.shape, HEADS), generator=generator)
    write = grid.spread(torch.tensor(values, dtype=torch.float64)[drawn])
    tensors = [q, F.normalize(k, dim=-1), v, -decay.abs(), beta.sigmoid(), state, write]
    return [x.detach().requires_grad_() for x in tensors]


def run(op, info: SequenceInfo, tensors: list[Tensor]) -> list[Tensor]:
    """Output, state and gradients, that of the gate by chunk."""

    def call(q, k, v, log_decay, beta, state, write):
        return op(q, k, v, log_decay, beta, info, initial_state=state, write=write)

    *rest, gate = outputs_and_gradients(call, tensors)
    return [*rest, chunk_grid(info, CHUNK).cut(gate).sum(2)]


def later(op):
    """`op` with the state after all that needs none."""

    def call(*tensors, initial_state, write):
        return op.response(*tensors, write=write).enter(initial_state)

    return call


@pytest.mark.parametrize("channels", [1, KEY])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_chunks_equal_the_token_loop(info, flags, channels, monkeypatch):
    monkeypatch.setattr(routed_delta, "SEGMENT", 2 * CHUNK)
    inputs = make_inputs(info, channels, (0.0, 1.0, 0.4))
    op = ChunkedRoutedDelta(chunk=CHUNK, **flags)
    expected = run(TokenLoopRoutedDelta(chunk=CHUNK, **flags), info, inputs)
    assert_equal(run(op, info, inputs), expected, 1e-10)
    assert_equal(run(later(op), info, inputs), expected, 1e-10)


@pytest.mark.parametrize("op", [TokenLoopRoutedDelta, ChunkedRoutedDelta])
@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_without_gates_it_is_the_delta_rule(info, op):
    *tokens, state, _ = make_inputs(info, 1, (1.0,))
    expected = TokenLoopDeltaRule()(*tokens, info, initial_state=state)
    assert_equal(op(chunk=CHUNK)(*tokens, info, initial_state=state), expected, 1e-12)


def test_a_chunk_that_is_not_written_decays_the_state_and_reads_itself():
    """By hand: three chunks, the second one dropped."""
    info = SequenceInfo.from_lengths([[3 * CHUNK]])
    q, k, v, log_decay, beta, _, _ = (x.detach() for x in make_inputs(info, 1, (1.0,)))
    write = torch.ones(1, 3 * CHUNK, HEADS)
    write[:, CHUNK : 2 * CHUNK] = 0
    got = TokenLoopRoutedDelta(chunk=CHUNK)(q, k, v, log_decay, beta, info, write=write.double())
    plain, parts = TokenLoopDeltaRule(), [slice(i, i + CHUNK) for i in (0, CHUNK, 2 * CHUNK)]

    def go_on(part: slice, state: Tensor | None):
        tokens = (x[:, part] for x in (q, k, v, log_decay, beta))
        span = SequenceInfo.span(1, part.start, part.stop)
        return plain(*tokens, span, initial_state=state)

    first = go_on(parts[0], None)
    second = go_on(parts[1], first.final_state)
    decay = log_decay[:, parts[1]].sum(1).exp().unsqueeze(-1)  # [1, heads, 1, 1]
    third = go_on(parts[2], first.final_state * decay)
    outputs = torch.cat([x.output for x in (first, second, third)], dim=1)
    assert_equal(got, [outputs, third.final_state], 1e-12)


@pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)
def test_a_dropped_row_is_diagonal(info):
    *tokens, _, write = make_inputs(info, KEY, (0.0,))
    transition = ChunkedRoutedDelta(chunk=CHUNK).response(*tokens, info, write=write).transition
    matrix = transition.tensor
    assert_equal([matrix], [matrix.diagonal(dim1=-2, dim2=-1).diag_embed()], 0)
