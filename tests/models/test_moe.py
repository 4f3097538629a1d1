"""Routing, load counts and the mixture against its definition."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.moe import MoE, Router
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.build import randomise


def make_moe(shared_hidden: int = 5) -> MoE:
    moe = MoE(
        8,
        ops=Ops(),
        num_experts=6,
        top_k=2,
        hidden=7,
        shared_hidden=shared_hidden,
        routed_scaling=2.5,
    ).double()
    moe.router.bias.copy_(torch.linspace(-0.3, 0.3, 6))
    return randomise(moe)


def make_input(info: SequenceInfo) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*info.shape, 8, generator=generator, dtype=torch.float64)


def test_mixture_equals_its_definition():
    moe, info = make_moe(), SequenceInfo.from_lengths([[9], [4, 5]])
    x = make_input(info)
    scores = (x @ moe.router.weight.T).sigmoid()
    chosen = (scores + moe.router.bias).topk(2, -1).indices
    mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    weights = 2.5 * scores * mask / (scores * mask).sum(-1, keepdim=True)
    gate, up = torch.einsum("bsd,ehd->bseh", x, moe.experts.gate_up).chunk(2, -1)
    experts = torch.einsum("bseh,edh->bsed", F.silu(gate) * up, moe.experts.down)
    expected = (weights.unsqueeze(-1) * experts).sum(2) + moe.shared(x, info)
    torch.testing.assert_close(moe(x, info), expected)


def test_counts_once_per_backward_without_padding_and_never_in_evaluation():
    moe = make_moe()
    info = SequenceInfo.from_lengths([[6], [4]], padding=[0, 2])
    x = make_input(info).requires_grad_()
    with torch.no_grad():
        moe(x, info)
    assert moe.router.counts.sum() == 0
    checkpoint(moe, x, info, use_reentrant=False).sum().backward()
    assert moe.router.counts.sum() == 2 * 10
    _, indices = moe.router(x.flatten(0, 1), info.valid.flatten())
    expected = indices[info.valid.flatten()].flatten().bincount(minlength=6)
    torch.testing.assert_close(moe.router.counts, expected)


def test_bias_moves_towards_equal_load():
    router = Router(8, num_experts=3, top_k=1, scaling=1.0)
    router.update_bias(torch.tensor([10, 4, 1]), 0.1)
    torch.testing.assert_close(router.bias, torch.tensor([-0.1, 0.1, 0.1]))


def test_router_stays_in_fp32_under_autocast():
    router = Router(8, num_experts=4, top_k=2, scaling=1.0)
    randomise(router)
    x = torch.randn(16, 8).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        weights, _ = router(x, torch.ones(16, dtype=torch.bool))
    exact, _ = router(x.float(), torch.ones(16, dtype=torch.bool))
    assert weights.dtype == torch.float32
    assert torch.equal(weights, exact)


def test_flops_and_idle_parameters():
    moe = make_moe()
    per_expert = 3 * 8 * 7
    assert moe.flops_per_token() == 2 * (6 * 8 + 2 * per_expert + 3 * 8 * 5)
    assert moe.idle_parameters() == 4 * per_expert
