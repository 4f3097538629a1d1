"""The norm of the gradients, which no one sees go wrong: it only clips."""

import pytest
import torch
from torch import nn

from parallel.mesh import Mesh
from trainer.engine import Engine


def test_the_norm_is_exact_for_large_gradients():
    """torch's own loses 8e-5 of the matrix here, and more of larger ones."""
    torch.manual_seed(0)
    shapes = [(2048, 2048), (3, 8, 16), (32,), (), (5,)]
    model = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])
    *reached, _ = model
    for parameter in reached:
        parameter.grad = torch.randn_like(parameter)
    before = torch.cat([parameter.grad.flatten() for parameter in reached]).double()
    optimizer = torch.optim.SGD(model.parameters())
    mesh = Mesh(device=torch.device("cpu"))
    engine = Engine(loss=model, model=model, optimizer=optimizer, mesh=mesh)
    assert engine.clip_grad_norm(2.0) == pytest.approx(float(before.norm()), rel=1e-6)
    after = torch.cat([parameter.grad.flatten() for parameter in reached]).double()
    torch.testing.assert_close(after, before * (2.0 / before.norm()), rtol=1e-6, atol=0)
