"""Which parameters decay."""

import pytest
import torch

from tests.models.build import make_model
from tests.trainer.tiny import MODEL
from trainer.optim import adamw, decay_groups

UNDECAYED = ("embed.weight", "norm.weight", "log_rate", "gate.bias", "query")


@pytest.mark.parametrize("more", [[], ["model=kimi_linear_attnres"], ["model.tie_embeddings=true"]])
def test_matrices_decay_and_nothing_else(more):
    model = make_model([*MODEL, *more])
    decayed, rest = map(set, decay_groups(model))
    assert not decayed & rest and len(decayed | rest) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert (parameter in rest) == name.endswith(UNDECAYED), name


def test_decay_moves_matrices_only():
    layer = torch.nn.Linear(3, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = adamw(layer, lr=0.1, weight_decay=0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), weight * 0.95)
    torch.testing.assert_close(layer.bias.detach(), bias, rtol=0, atol=0)


def test_rate_and_eps_must_be_positive():
    with pytest.raises(ValueError, match="lr is 0"):
        adamw(torch.nn.Linear(1, 1), lr=0)
    with pytest.raises(ValueError, match="eps is 0"):
        adamw(torch.nn.Linear(1, 1), lr=1, eps=0)
