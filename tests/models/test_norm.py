"""RMSNorm against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from models.norm import RMSNorm
from tests.helpers import assert_equal, outputs_and_gradients, random_tensors


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 4, 8), (0, 8)])
def test_equals_torch(shape):
    norm = RMSNorm(8, eps=0.1).double()
    x, norm.weight.data = (t.detach() for t in random_tensors(shape, (8,)))
    x.requires_grad_()
    inputs = [x, norm.weight]
    got = outputs_and_gradients(lambda x, weight: norm(x), inputs)
    expected = outputs_and_gradients(lambda x, weight: F.rms_norm(x, (8,), weight, 0.1), inputs)
    assert_equal(got, expected, 1e-12)


def test_statistics_are_wide_and_the_dtype_stays():
    norm = RMSNorm(512)
    (x,) = random_tensors((4, 512), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(lambda x, weight: norm(x), [x, norm.weight])
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    exact = x.detach().double().requires_grad_()
    truth = outputs_and_gradients(
        lambda x, weight: F.rms_norm(x, (512,), weight),
        [exact, norm.weight.detach().double().requires_grad_()],
    )
    assert got[0].equal(truth[0].bfloat16())
    assert (got[1] - truth[1]).abs().max() <= 0.01 * truth[1].abs().max()
