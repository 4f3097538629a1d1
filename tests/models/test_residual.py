"""Block Attention Residuals against the formula of arXiv 2603.15031, written out."""

import pytest
import torch

from models.residual import AttentionResidual, SumResidual

D = 6


def make_residuals(block: int, sublayers: int) -> list[AttentionResidual]:
    generator = torch.Generator().manual_seed(0)
    residuals = []
    for i in range(sublayers + 1):
        residual = AttentionResidual(D, opens_block=i % block == 0, norm_eps=1e-5).double()
        for parameter in residual.parameters():
            parameter.data.copy_(torch.randn(D, generator=generator))
        residuals.append(residual)
    return residuals


def mix(residual: AttentionResidual, sources: list[torch.Tensor]) -> torch.Tensor:
    scores = torch.stack(
        [
            (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5) * residual.norm.weight)
            @ residual.query
            for s in sources
        ]
    )
    return (scores.softmax(0).unsqueeze(-1) * torch.stack(sources)).sum(0)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_stream_equals_the_written_out_sum(block):
    residuals = make_residuals(block, sublayers=5)
    x = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def sublayer(i: int, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h * (i + 1))

    stream = (x,)
    outputs: list[torch.Tensor] = []
    for i, residual in enumerate(residuals):
        sums = [sum(outputs[j : j + block]) for j in range(0, len(outputs), block)]
        expected = mix(residual, [x, *sums])
        read = residual(stream)
        torch.testing.assert_close(read, expected)
        if i < 5:
            stream = residual.write(stream, sublayer(i, read))
            outputs.append(sublayer(i, expected))


def test_starts_as_an_even_mix():
    residual = make_residuals(1, 0)[0]
    residual.reset_parameters(0.02)
    stream = tuple(torch.full((1, 1, D), float(i), dtype=torch.float64) for i in (1, 2, 6))
    torch.testing.assert_close(residual(stream), torch.full((1, 1, D), 3.0).double())


def test_sum_residual_adds():
    x = torch.ones(1, 2, D)
    (total,) = SumResidual().write((x,), 2 * x)
    torch.testing.assert_close(total, 3 * x)
