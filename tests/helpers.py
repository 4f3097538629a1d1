"""What many tests share: packed layouts, random inputs, comparing every gradient, a full disk."""

import contextlib
import resource
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from models.sequence import Fragment, SequenceInfo


def scattered_info() -> SequenceInfo:
    """Rows as a rank of a context-parallel run sees them: documents that begin before the row, go
    on over a fragment's edge, and come back after a gap."""
    first = [Fragment(5, 40, 3), Fragment(4, 45, 8), Fragment(1, 60), Fragment(7, 52, 15)]
    second = [
        Fragment(2, 8),
        Fragment(6, 10, 0),
        Fragment(3, 30, 20),
        Fragment(6, 90, padding=True),
    ]
    return SequenceInfo.from_fragments([first, second])


INFOS = {
    "one token": SequenceInfo.from_lengths([[1]]),
    "one document": SequenceInfo.from_lengths([[17]]),
    "equal rows": SequenceInfo.from_lengths([[5, 1, 11]] * 3),
    "unequal rows": SequenceInfo.from_lengths(
        [[1, 2, 14], [17], [16], [9, 3]], padding=[0, 0, 1, 5]
    ),
    "continued": SequenceInfo.span(2, 9, 26),
    "scattered": scattered_info(),
}


def random_tensors(*shapes: Sequence[int], dtype=torch.float64, device="cpu") -> list[Tensor]:
    """Independent normal numbers, the same in every call, that require gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def outputs_and_gradients(function: Callable, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `function(*inputs)` returns, a tensor or several, and the gradient of every input under
    a random weighting of all outputs; zeros for an input that takes no part."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in outputs
    )
    grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [*(x.detach() for x in outputs), *grads]


def assert_equal(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Largest difference of each pair, relative to the largest entry; dtypes equal too."""
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert x.shape == y.shape and x.dtype == y.dtype, i
        assert torch.isfinite(x).equal(torch.isfinite(y)), i
        x, y = (torch.nan_to_num(z.double(), posinf=0, neginf=0) for z in (x, y))
        error = (x - y).abs().amax() if x.numel() else 0.0
        scale = y.abs().amax() if y.numel() else 1.0
        assert error <= tolerance * max(scale, 1e-2), f"tensor {i}: {error} of {scale}"


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows above so many bytes: to it, the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
