"""Eight bits a value: how far off they may be, and what is never put into them."""

import pytest
import torch

from parallel.block_scaled import BLOCK, BlockScaled, can_hold

WORST = {"int8": 1 / 254, "fp8": 1 / 16}  # int8: of the block's largest value; fp8: of each


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rounds_to_nearest_within_its_block(format, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 2 * BLOCK + 64, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-9, 9, 15, dtype=torch.float64).view(5, 3, 1)
    x = x.to(dtype)
    held = BlockScaled.encode(x, format)
    assert held.codes.element_size() == 1 and held.codes.shape == x.shape
    assert held.scales.numel() == x.numel() // 64
    error = (held.decode().double() - x.double()).abs().unflatten(-1, (-1, 64))
    blocks = x.double().abs().unflatten(-1, (-1, 64))
    largest = blocks.amax(-1, keepdim=True)
    scale = largest if format == "int8" else blocks + largest / 448 * 2**-5
    narrow = torch.finfo(dtype).eps  # the result is rounded once more
    assert (error <= WORST[format] * scale * 1.001 + narrow * blocks).all()
    assert error.square().mean().sqrt() > 0
    assert held.decode().dtype == dtype and held.decode().shape == x.shape


def test_what_it_holds_exactly():
    codes = torch.arange(BLOCK).float()
    assert BlockScaled.encode(codes, "int8").decode().equal(codes)
    powers = 448 * 2.0 ** -(torch.arange(BLOCK) % 12).float()
    assert BlockScaled.encode(powers, "fp8").decode().equal(powers)
    for format in ("int8", "fp8"):
        assert not BlockScaled.encode(torch.zeros(2, BLOCK), format).decode().any()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_become_so(format, bad):
    x = torch.randn(2, BLOCK)
    x[0, 7] = bad
    decoded = BlockScaled.encode(x, format).decode()
    assert not decoded[0].isfinite().any() and decoded[1].isfinite().all()


def test_a_transposed_tensor():
    x = torch.randn(64, 5, 32).transpose(0, 1)
    torch.testing.assert_close(BlockScaled.encode(x, "int8").decode(), x, rtol=0, atol=0.03)


def test_only_floating_tensors_with_rows_to_share_a_scale():
    assert can_hold(torch.zeros(3, 32)) and can_hold(torch.zeros(1, 7 * 32, dtype=torch.bfloat16))
    for x in (torch.zeros(128, 1), torch.zeros(3, 16), torch.zeros(3, 33), torch.tensor(1.0)):
        assert not can_hold(x)
    assert not can_hold(torch.zeros(3, 128, dtype=torch.int64))
    assert not can_hold(torch.zeros(3, 128, dtype=torch.bool))
