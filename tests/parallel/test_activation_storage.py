"""Which of a layer's saved tensors are rounded, and how often."""

import pytest
import torch
from torch import Tensor, nn

from parallel.activation_storage import apply_activation_storage
from parallel.block_scaled import BlockScaled

TOKENS, WIDTH = 96, 64


class Layer(nn.Module):
    """Two linear maps of one input, behind what saves that input itself or not."""

    def __init__(self, *, saves: bool) -> None:
        super().__init__()
        self.saves = saves
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.short = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.square().mean() if self.saves else x.mean()
        half = self.first(x) + self.second(x[:, :])
        return (half * half).mean() * scale + self.short(x[:7]).sum()


@pytest.fixture
def encoded(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what is rounded."""
    shapes: list[tuple[int, ...]] = []
    encode = BlockScaled.encode
    monkeypatch.setattr(
        BlockScaled, "encode", lambda x, format: shapes.append(tuple(x.shape)) or encode(x, format)
    )
    return shapes


def step(layer: Layer, *, autocast: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = layer(x)
    loss.backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


def rounding(layer: Layer) -> Layer:
    apply_activation_storage([layer], rounding="int8", rounded=(nn.Linear,))
    return layer


def test_an_input_is_rounded_once_for_all_that_share_it(encoded):
    exact, got = step(Layer(saves=False)), step(rounding(Layer(saves=False)))
    assert encoded == [(TOKENS, WIDTH)]
    names = ["x", *(name for name, _ in Layer(saves=False).named_parameters())]
    errors = {
        n: float((a - b).norm() / b.norm()) for n, a, b in zip(names, got, exact, strict=True)
    }
    wrong = {name for name, error in errors.items() if error}
    assert wrong == {"first.weight", "second.weight"} and max(errors.values()) < 0.01


def test_what_is_saved_exactly_already_is_not_rounded(encoded):
    exact, got = step(Layer(saves=True)), step(rounding(Layer(saves=True)))
    assert not encoded
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_autocasts_copies_of_weights_are_not_rounded(encoded):
    step(rounding(Layer(saves=False)), autocast=True)
    assert set(encoded) == {(TOKENS, WIDTH)}
