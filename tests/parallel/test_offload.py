"""Saved tensors away and back: the same bits, each storage once, and not all on the device."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel import offload
from parallel.activation_checkpoint import apply_activation_checkpointing
from parallel.activation_storage import apply_activation_storage
from parallel.offload import Offload

CPU = torch.device("cpu")
LAYERS, TOKENS, WIDTH = 4, 24, 32


class Layer(nn.Module):
    """Saves parameters, its input, three views of one storage, and a tensor of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.seen: StorageWeakRef

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, x = stream[0], stream[-1]
        a, b, c = (self.linear(x).tanh() * 2).chunk(3, dim=-1)
        self.seen = StorageWeakRef(a.untyped_storage())
        y = x + a.exp() * b * self.scale * c * first
        return (first, y)


def make() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(LAYERS)).double()


def loss(layers: nn.ModuleList) -> Tensor:
    x = torch.linspace(-1, 1, TOKENS * WIDTH, dtype=torch.float64).view(TOKENS, WIDTH)
    stream = (x.requires_grad_(), x * 1)
    for layer in layers:
        stream = layer(stream)
    return stream[-1].square().sum()


def gradients(layers: nn.ModuleList) -> dict[str, Tensor]:
    layers.zero_grad()
    loss(layers).backward()
    return {name: p.grad.clone() for name, p in layers.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("min_bytes", [0, TOKENS * WIDTH * 8, 10**9])
def test_gradients_are_the_same_bits(checkpointed, min_bytes):
    expected = gradients(make())
    layers = make()
    if checkpointed:
        apply_activation_checkpointing(layers)
    apply_activation_storage(layers, offload=Offload(CPU, min_bytes=min_bytes))
    for _ in range(2):
        torch.testing.assert_close(gradients(layers), expected, rtol=0, atol=0)


def test_a_backward_may_be_repeated():
    layers = make()
    apply_activation_storage(layers, offload=Offload(CPU, min_bytes=0))
    total = loss(layers)
    weights = list(layers.parameters())
    first = torch.autograd.grad(total, weights, retain_graph=True)
    loss(layers)  # another forward between the two
    torch.testing.assert_close(torch.autograd.grad(total, weights), first, rtol=0, atol=0)


def test_each_storage_travels_once_and_two_layers_are_on_the_device(monkeypatch):
    """In units of [tokens, width]: of each transfer, and of what the device holds after it."""
    unit, sent, held = TOKENS * WIDTH * 8, [], []
    send, away = offload._Wire.send, Offload(CPU, min_bytes=unit)

    def counted(wire, pairs):
        sent.append(sum(to.nbytes for to, _ in pairs) / unit)
        copies = [copy for copy in away._copies.values() if copy.here is not None]
        held.append(sum(copy.data().nbytes for copy in copies) / unit)
        return send(wire, pairs)

    monkeypatch.setattr(offload._Wire, "send", counted)
    layers = make()
    apply_activation_storage(layers, offload=away)
    total = loss(layers)
    gc.collect()
    # x, tanh, its double in three views, exp, three products: the first tensor only with layer 0.
    assert sent == [12, 11, 11, 11]
    assert [not layer.seen.expired() for layer in layers] == [False, False, False, True]
    total.backward()
    del total
    gc.collect()
    assert sent[4:] == [1, 11, 11, 11] and max(held) <= 2 * 11 + 1
    assert all(layer.seen.expired() for layer in layers) and not away._copies


class Reader(nn.Module):
    """Its weight is saved as it is and transposed, and so is an input of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.mT) * self.weight


def test_a_parameter_is_read_in_the_backward():
    """As an engine needs it that gathers parameters twice and gives them up in between."""
    layer = Reader()
    apply_activation_storage([layer], offload=Offload(CPU, min_bytes=0))
    values = layer.weight.detach().clone()
    x = torch.rand(WIDTH, WIDTH, requires_grad=True)
    y = layer(x)
    taken = StorageWeakRef(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0)
    assert taken.expired()
    both = torch.cat([torch.full_like(values, torch.nan), values])  # in a larger storage
    layer.weight.data = both[WIDTH:]
    y.sum().backward()
    torch.testing.assert_close(x.grad, values @ values)


def test_a_parameter_must_not_change_in_between():
    layer = Reader()
    apply_activation_storage([layer], offload=Offload(CPU))
    y = layer(torch.rand(WIDTH, WIDTH))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"a tensor \[32, 32\] was written to between forward"):
        y.sum().backward()


def test_nothing_is_kept_without_gradients(monkeypatch):
    monkeypatch.setattr(Offload, "put", None)
    layers = make()
    apply_activation_storage(layers, offload=Offload(CPU, min_bytes=0))
    with torch.no_grad():
        assert loss(layers) == loss(make())
