"""Experts: the fast paths against the loop over experts, with every gradient."""

import pytest
import torch
from torch import Tensor

from models.ops.experts import GroupedExperts, GroupedMatmulExperts, LoopExperts
from tests.helpers import assert_equal, outputs_and_gradients, random_tensors

TOKENS, EXPERTS, TOP_K, D_MODEL, HIDDEN = 19, 5, 2, 8, 16


def inputs(tokens: int = TOKENS, **kwargs) -> list[Tensor]:
    """x, weights, gate_up, down."""
    return random_tensors(
        (tokens, D_MODEL),
        (tokens, TOP_K),
        (EXPERTS, 2 * HIDDEN, D_MODEL),
        (EXPERTS, D_MODEL, HIDDEN),
        **kwargs,
    )


def choices(tokens: int = TOKENS) -> Tensor:
    """Distinct experts per token; expert 3 gets none."""
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(3))
    scores[:, 3] = -1
    return scores.topk(TOP_K).indices


def attend(experts, indices: Tensor):
    return lambda x, weights, *stacks: experts(x, weights, indices, *stacks)


def test_definition_by_hand():
    x, weights, gate_up, down = inputs()
    indices = choices()
    output = LoopExperts()(x, weights, indices, gate_up, down)
    for t in range(TOKENS):
        expected = torch.zeros(D_MODEL, dtype=x.dtype)
        for slot, expert in enumerate(indices[t].tolist()):
            gate, up = (gate_up[expert] @ x[t]).split(HIDDEN)
            y = down[expert] @ (gate * gate.sigmoid() * up)
            expected = expected + weights[t, slot] * y
        torch.testing.assert_close(output[t], expected)


@pytest.mark.parametrize("tokens", [TOKENS, 1, 0])
def test_grouped_equals_loop(tokens):
    tensors, indices = inputs(tokens), choices(tokens)
    got = outputs_and_gradients(attend(GroupedExperts(), indices), tensors)
    expected = outputs_and_gradients(attend(LoopExperts(), indices), tensors)
    assert_equal(got, expected, 1e-12)
    assert got[3][3].eq(0).all() and got[4][3].eq(0).all()  # the expert without tokens


@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_grouped_matmul_equals_loop(tokens):
    """In fp32, the widest that the kernel takes; on a CPU too, though it is meant for CUDA."""
    tensors, indices = inputs(tokens, dtype=torch.float32), choices(tokens)
    got = outputs_and_gradients(attend(GroupedMatmulExperts(), indices), tensors)
    expected = outputs_and_gradients(attend(LoopExperts(), indices), tensors)
    assert_equal(got, expected, 1e-5)


@pytest.mark.parametrize("experts", [GroupedExperts(), GroupedMatmulExperts()])
def test_autocast_narrows_products_and_not_parameters(experts):
    tensors, indices = inputs(dtype=torch.float32), choices()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = outputs_and_gradients(attend(LoopExperts(), indices), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = experts(*tensors[:2], indices, *tensors[2:])
        assert output.dtype == torch.bfloat16
        got = outputs_and_gradients(attend(experts, indices), tensors)
    assert {x.dtype for x in got[1:]} == {torch.float32}
    for x, y in zip(got, truth, strict=True):
        assert (x - y).norm() <= 0.02 * y.norm()


def test_sums_have_a_fixed_order():
    tensors, indices = inputs(dtype=torch.float32), choices()
    first = outputs_and_gradients(attend(GroupedExperts(), indices), tensors)
    again = outputs_and_gradients(attend(GroupedExperts(), indices), tensors)
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))


def test_sizes_that_the_kernel_cannot_take():
    x, weights, gate_up, down = inputs()
    with pytest.raises(ValueError, match="multiples of 8, got d_model 8 and hidden 15"):
        GroupedMatmulExperts()(x, weights, choices(), gate_up[:, :30], down[..., :15])
