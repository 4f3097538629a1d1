"""The decayed sum: the definition against the attention it is, the chunked form against both."""

import pytest
import torch
from torch import Tensor

from models.ops.decayed_sum import ChunkedDecayedSum, TokenLoopDecayedSum
from models.sequence import SequenceInfo
from tests.helpers import assert_equal, scattered_info
from tests.models.ops.test_delta_rule import (
    GATES,
    PACKINGS,
    continued,
    entered,
    make_inputs,
    run,
)

LAYOUTS = {str(rows): continued(rows) for rows in PACKINGS} | {"scattered": scattered_info()}


def few_chunks() -> ChunkedDecayedSum:
    op = ChunkedDecayedSum()
    op.segment = 2  # several segments in 200 tokens
    return op


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("info", LAYOUTS.values(), ids=LAYOUTS)
def test_chunked_equals_token_loop(info, gate):
    inputs = make_inputs(info, gate, torch.float64, decays=1)
    expected = run(TokenLoopDecayedSum(), inputs, info)
    for op in (few_chunks(), entered(few_chunks()), entered(TokenLoopDecayedSum())):
        assert_equal(run(op, inputs, info), expected, 1e-12)
    narrow = [x.detach().float().requires_grad_() for x in inputs]
    for op in (few_chunks(), entered(few_chunks())):
        got = run(op, narrow, info)
        assert all(x.dtype == torch.float32 for x in got)
        assert_equal([x.double() for x in got], expected, 2e-5)


def test_it_is_attention_with_decayed_scores():
    """Softmax-free, and quadratic in the length."""
    info = SequenceInfo.from_lengths([[30, 100], [130]])
    *tokens, _ = make_inputs(info, "mixed", torch.float64, decays=1)

    def attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        sums = log_decay.squeeze(-1).cumsum(1)  # [B, S, H]
        document = (info.index - info.positions)[:, :, None, None]
        sums = sums.unsqueeze(2) - sums.unsqueeze(1)  # [B, queries, keys, H]
        seen = (document == document.transpose(1, 2)) & (sums <= 0)
        seen &= (info.index.unsqueeze(2) >= info.index.unsqueeze(1)).unsqueeze(-1)
        decays = sums.masked_fill(~seen, -torch.inf).exp()
        scores = torch.einsum("bihk,bjhk->bijh", q, k) * decays * beta.unsqueeze(1)
        return torch.einsum("bijh,bjhv->bihv", scores, v)

    for op in (TokenLoopDecayedSum(), ChunkedDecayedSum()):
        output = op(*tokens, info).output
        expected = attention(*tokens)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).double()
        got = [output, *torch.autograd.grad((output * weight).sum(), tokens)]
        want = [expected, *torch.autograd.grad((expected * weight).sum(), tokens)]
        assert_equal(got, want, 1e-10)


def test_the_backward_keeps_inputs_and_states_alone():
    kept = {}
    for chunks in (32, 64):
        info = SequenceInfo.from_lengths([[chunks * 64]])
        tensors = [
            torch.randn(1, chunks * 64, 1, dim, requires_grad=True) for dim in (4, 4, 4, 1, 1)
        ]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            ChunkedDecayedSum()(*tensors[:3], -tensors[3].exp(), tensors[4].squeeze(-1), info)
        kept[chunks] = sum(x.numel() for x in saved) / info.shape[1]
    assert kept[64] == pytest.approx(kept[32])
    assert kept[64] < 4 * 4 + 4  # of 13 numbers a token


def test_decays_beyond_the_exponent_range_stay_finite():
    info = continued([[100], [100]])
    q, k, v, _, beta, state = (x.detach() for x in make_inputs(info, "none", torch.float32))
    log_decay = torch.full_like(beta, -1e4).unsqueeze(-1).requires_grad_()
    output, final = ChunkedDecayedSum()(q, k, v, log_decay, beta, info, initial_state=state)
    (grad,) = torch.autograd.grad(output.sum() + final.sum(), log_decay)
    assert output.isfinite().all() and grad.isfinite().all()


def test_bfloat16_values_keep_an_fp32_state():
    info = continued([[70], [70]])
    inputs = make_inputs(info, "keeping", torch.float32, decays=1)
    *tokens, state = (x.detach().bfloat16() for x in inputs)
    for op in (ChunkedDecayedSum(), entered(ChunkedDecayedSum())):
        output, final = op(*tokens, info, initial_state=state)
        assert output.dtype == torch.bfloat16 and final.dtype == torch.float32
