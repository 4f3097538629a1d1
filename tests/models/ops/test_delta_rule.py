"""The chunked delta rule against the token loop: outputs, states and every gradient."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.delta_rule import ChunkedDeltaRule, TokenLoopDeltaRule
from models.ops.dyadic import DyadicScores
from models.ops.scalar_decay import ScalarScores
from models.sequence import Fragment, Recurrent, SequenceInfo
from tests.helpers import assert_equal

HEADS, KEY, VALUE = 3, 8, 5
# Documents of the two rows: cuts inside chunks, on their edges, and of a single token.
PACKINGS = [[[1], [1]], [[63], [63]], [[130], [65, 65]], [[3, 1, 60, 64, 72], [200]]]
GATES = {
    "forgetting": (-20.0, -15.0),
    "mixed": (-20.0, 0.0),
    "keeping": (-1e-3, 0.0),
    "none": (0.0, 0.0),
}


def make_inputs(
    info: SequenceInfo, gate: str, dtype: torch.dtype, *, decays: int = KEY
) -> list[Tensor]:
    """q, k, v, log_decay, beta, initial state; heads and documents differ. decays: per head."""
    generator = torch.Generator().manual_seed(0)
    batch, seq = info.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low, high = GATES[gate]
    gates = torch.rand(batch, seq, HEADS, decays, generator=generator, dtype=torch.float64)
    gates = (low + (high - low) * gates**4) * torch.tensor([1.0, 0.3, 0.9])[:, None]
    tensors = [
        F.normalize(normal(batch, seq, HEADS, KEY), dim=-1) * KEY**-0.5,
        F.normalize(normal(batch, seq, HEADS, KEY), dim=-1),
        normal(batch, seq, HEADS, VALUE),
        gates,
        normal(batch, seq, HEADS).sigmoid(),
        normal(batch, HEADS, KEY, VALUE),
    ]
    return [x.to(dtype).requires_grad_() for x in tensors]


def run(op, inputs: list[Tensor], info: SequenceInfo) -> list[Tensor]:
    *tokens, state = inputs
    output, final = op(*tokens, info, initial_state=state)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (output, final)
    )
    return [output, final, *torch.autograd.grad(loss, inputs)]


def continued(rows: list[list[int]]) -> SequenceInfo:
    """The first row goes on inside a document and keeps the initial state; the other drops it."""
    fragments = []
    for row, first in zip(rows, (7, 0), strict=True):
        index, tiled = first, []
        for i, length in enumerate(row):
            tiled.append(Fragment(length, index, first if i == 0 else 0))
            index += length
        fragments.append(tiled)
    return SequenceInfo.from_fragments(fragments)


def entered(op):
    """`op` on a row whose state comes after all that needs none."""
    return lambda *tokens, initial_state: op.response(*tokens).enter(initial_state)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rows", PACKINGS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"]
)
def test_chunked_equals_token_loop(rows, gate, dtype, tolerance):
    info = continued(rows)
    inputs = make_inputs(info, gate, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    op = ChunkedDeltaRule()
    op.segment = 2  # several segments in 200 tokens
    names = ("output", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate")
    expected = run(TokenLoopDeltaRule(), wide, info)
    for way in (op, entered(op)):
        for name, got, want in zip(names, run(way, inputs, info), expected, strict=True):
            scale = want.abs().max().clamp(min=1e-30)
            assert (got - want).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rows", PACKINGS, ids=str)
def test_one_decay_per_head(rows, gate):
    """Chunked equals token loop, and both the same decay in every channel."""
    info = continued(rows)
    inputs = make_inputs(info, gate, torch.float64, decays=1)
    op = ChunkedDeltaRule()
    op.segment = 2
    expected = run(TokenLoopDeltaRule(), inputs, info)
    assert_equal(run(op, inputs, info), expected, 1e-12)
    assert_equal(run(entered(op), inputs, info), expected, 1e-12)
    inputs[3] = inputs[3].detach().expand_as(inputs[1]).contiguous().requires_grad_()
    channels = run(op, inputs, info)
    channels[5] = channels[5].sum(-1, keepdim=True)
    assert_equal(channels, expected, 1e-12)


@pytest.mark.parametrize("seq", [64, 128])
def test_a_single_chunk_of_a_single_head(seq):
    info = SequenceInfo.from_lengths([[seq], [seq]])
    *tokens, state = make_inputs(info, "mixed", torch.float64)
    one = [x[:1, :, 1:2].detach().requires_grad_() for x in tokens]
    one.append(state[:1, 1:2].detach().requires_grad_())
    op = ChunkedDeltaRule()
    op.segment = 1
    info = info.row(0)
    for got, want in zip(run(op, one, info), run(TokenLoopDeltaRule(), one, info), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_weak_decays_beside_strong_ones_keep_their_precision():
    """A running sum of -1280 nats would round a decay of 1e-3 beside it to 1e-4."""
    log_decay = torch.full((1, 64, 2), -40.0)
    log_decay[:, 60:] = -1e-3
    q = torch.ones(1, 64, 2)
    qk = DyadicScores(q, q, log_decay).scores[:, 0]
    exact = 2 * torch.exp(torch.tensor(-3e-3, dtype=torch.float64))
    assert abs(qk[0, 63, 60].double() - exact) <= 1e-6
    qk = ScalarScores(q, q, log_decay[..., :1]).scores[:, 0]
    assert abs(qk[0, 63, 60].double() - exact) <= 1e-6


def test_decays_beyond_the_exponent_range_stay_finite():
    info = SequenceInfo.from_lengths([[100]])
    q, k, v, _, beta, state = (
        x[:1].detach() for x in make_inputs(continued([[100], [100]]), "none", torch.float32)
    )
    for log_decay in (torch.full_like(k, -1e4), torch.full_like(k[..., :1], -1e4)):
        log_decay.requires_grad_()
        output, final = ChunkedDeltaRule()(q, k, v, log_decay, beta, info, initial_state=state)
        (grad,) = torch.autograd.grad(output.sum() + final.sum(), log_decay)
        assert output.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("op", [TokenLoopDeltaRule(), ChunkedDeltaRule()], ids=["loop", "chunked"])
def test_segments_chained_equal_the_whole(op):
    info = SequenceInfo.from_lengths([[150], [150]])
    q, k, v, log_decay, beta, _ = make_inputs(info, "mixed", torch.float64)
    whole = op(q, k, v, log_decay, beta, info)
    outputs, state = [], None
    for start, stop in ((0, 1), (1, 70), (70, 150)):
        part = (x[:, start:stop] for x in (q, k, v, log_decay, beta))
        result = op(*part, SequenceInfo.span(2, start, stop), initial_state=state)
        outputs.append(result.output)
        state = result.final_state
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, whole.final_state, rtol=0, atol=1e-13)


@pytest.mark.parametrize("op", [TokenLoopDeltaRule(), ChunkedDeltaRule()], ids=["loop", "chunked"])
def test_a_gap_forgets_the_state(op):
    """Runs of a row, as a rank of a context-parallel run holds them, know nothing of each other."""
    rows = [
        [Fragment(70, 300, 200), Fragment(10, 370, 270), Fragment(65, 500, 400), Fragment(5, 600)],
        [Fragment(64, 40), Fragment(86, 110, 70)],
    ]
    info = SequenceInfo.from_fragments(rows)
    *tokens, state = make_inputs(info, "keeping", torch.float64)
    output, final = op(*tokens, info, initial_state=state)
    later = entered(op)(*tokens, info, initial_state=state)
    torch.testing.assert_close(later, Recurrent(output, final), rtol=0, atol=1e-13)
    for b, cuts in enumerate([(0, 80, 145, 150), (0, 64, 150)]):
        entering = state[b : b + 1]
        for start, stop in pairwise(cuts):
            part = [x[b : b + 1, start:stop] for x in tokens]
            first = int(info.index[b, start]), int(info.positions[b, start])
            alone = SequenceInfo.from_fragments([[Fragment(stop - start, *first)]])
            result = op(*part, alone, initial_state=entering)
            torch.testing.assert_close(
                output[b : b + 1, start:stop], result.output, atol=1e-13, rtol=0
            )
            entering = torch.zeros_like(entering)
        torch.testing.assert_close(final[b : b + 1], result.final_state, atol=1e-13, rtol=0)


def test_nothing_passes_a_document_start():
    info = continued([[90], [90]])
    *tokens, _ = make_inputs(info, "keeping", torch.float64)
    response = ChunkedDeltaRule().response(*tokens, info)
    assert response.transition.tensor[0].any() and not response.transition.tensor[1].any()
    assert response.reads[0].any(-1).all() and not response.reads[1].any()


def test_bfloat16_values_keep_an_fp32_state():
    info = SequenceInfo.from_lengths([[70], [70]])
    inputs = [x.detach().to(torch.bfloat16) for x in make_inputs(info, "keeping", torch.float32)]
    output, final = ChunkedDeltaRule()(*inputs[:5], info)
    assert output.dtype == torch.bfloat16
    assert final.dtype == torch.float32


def test_bfloat16_outputs_are_rounded_once_all_is_added():
    info = continued([[70], [70]])
    *tokens, state = (x.detach() for x in make_inputs(info, "keeping", torch.float32))
    tokens = [x.bfloat16() for x in tokens]
    later = entered(ChunkedDeltaRule())
    output, final = later(*tokens, info, initial_state=state)
    wide, same = later(*(x.float() for x in tokens), info, initial_state=state)
    assert torch.equal(output, wide.bfloat16()) and torch.equal(final, same)
