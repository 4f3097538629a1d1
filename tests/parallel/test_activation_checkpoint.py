"""Activation checkpointing: the same gradients under the same names, from a second forward."""

import torch
from torch import Tensor, nn

from parallel.activation_checkpoint import apply_activation_checkpointing


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.calls += 1
        return (*stream, self.linear(stream[-1]).tanh())


def gradients(model: nn.Sequential) -> dict[str, Tensor]:
    x = torch.ones(2, 4)
    torch.stack(model((x,))).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_changes_nothing_but_what_is_kept():
    torch.manual_seed(0)
    plain = nn.Sequential(*(Layer() for _ in range(3)))
    model = nn.Sequential(*(Layer() for _ in range(3)))
    model.load_state_dict(plain.state_dict())
    apply_activation_checkpointing(nn.ModuleList(model))
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=0)
    assert [layer.calls for layer in plain] == [1, 1, 1]
    assert [layer.calls for layer in model] == [2, 2, 2]
