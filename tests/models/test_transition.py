"""Transitions: maps that compose in order, and their adjoints."""

import pytest
import torch

from models.transition import DenseTransition, DiagonalTransition
from tests.helpers import random_tensors

BATCH, HEADS, KEY, VALUE = 2, 3, 4, 5
KINDS = {
    "dense": (DenseTransition, (KEY, KEY)),
    "diagonal": (DiagonalTransition, (KEY,)),
    "scalar": (DiagonalTransition, (1,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_laws(kind):
    make, size = KINDS[kind]
    shape, state_shape = (BATCH, HEADS, *size), (BATCH, HEADS, KEY, VALUE)
    *maps, state, grad = random_tensors(shape, shape, state_shape, state_shape)
    later, earlier = (make(x) for x in maps)
    both = later.compose(earlier)
    assert both.tensor.shape == shape  # a message does not grow
    torch.testing.assert_close(both.apply(state), later.apply(earlier.apply(state)))
    (expected,) = torch.autograd.grad(both.apply(state), state, grad)
    torch.testing.assert_close(both.adjoint(grad), expected)


def test_a_dense_one_multiplies_from_the_left():
    tensor, state = random_tensors((1, 1, KEY, KEY), (1, 1, KEY, VALUE))
    expected = torch.einsum("bhij,bhjv->bhiv", tensor, state)
    torch.testing.assert_close(DenseTransition(tensor).apply(state), expected)
