"""Saved tensors on their way to the host and back, beside a device that computes meanwhile."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.activation_checkpoint import apply_activation_checkpointing
from parallel.activation_storage import apply_activation_storage
from parallel.offload import Offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
LAYERS, TOKENS, WIDTH = 12, 8192, 512


class Layer(nn.Module):
    """Saves much and computes little, so that copies are late."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = stream[0]
        return (x + F.gelu(self.linear(x).tanh() * x.sigmoid()),)


def make() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(LAYERS)).to(DEVICE)


def gradients(layers: nn.ModuleList, seed: int) -> tuple[list[Tensor], int]:
    """And the bytes on the device at the end of the forward."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    stream = (torch.randn(TOKENS, WIDTH, device=DEVICE, generator=generator, requires_grad=True),)
    before = torch.cuda.memory_allocated()
    x = stream[0]
    for layer in layers:
        stream = layer(stream)
    held = torch.cuda.memory_allocated() - before
    return list(torch.autograd.grad(stream[0].square().sum(), [x, *layers.parameters()])), held


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("format", [None, "int8"])
def test_gradients_are_the_same_bits_and_memory_falls(checkpointed, format):
    runs = []
    for offload in (None, Offload(DEVICE)):
        layers = make()
        if checkpointed:
            apply_activation_checkpointing(layers)
        kinds = None if checkpointed else (nn.Linear,)
        apply_activation_storage(layers, rounding=format, rounded=kinds, offload=offload)
        runs.append([gradients(layers, seed) for seed in range(8)])
    for (kept, held), (moved, held_less) in zip(*runs, strict=True):
        torch.testing.assert_close(moved, kept, rtol=0, atol=0)
        assert held_less < 0.5 * held
