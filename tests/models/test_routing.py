"""Who routes which chunks where, what the routers count, and what a layer remembers."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.ops.choices import Choices
from models.ops.routed import ABSENT
from models.ops.routed_grid import ChunkGrid, chunk_grid
from models.routing import LearnedRouter, StaticRouter
from models.sequence import SequenceInfo
from tests.models.build import make_mixer, randomise
from trainer.errors import ConfigError

WIDTH, HEADS, CHUNK = 6, 3, 4
INFO = SequenceInfo.from_lengths([[13, 7], [16]], padding=[0, 4])


def make_router(**keywords) -> LearnedRouter:
    return randomise(LearnedRouter(WIDTH, num_heads=HEADS, **keywords).double())


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def means(grid: ChunkGrid) -> Tensor:
    return draw(*grid.shape, WIDTH).requires_grad_()


def test_a_chunk_is_pooled_over_the_tokens_that_it_has():
    grid = chunk_grid(INFO, CHUNK)
    x = draw(2, 20, WIDTH)
    lengths = [[4, 4, 4, 1, 4, 3], [4, 4, 4, 4, 4]]
    expected = [
        torch.stack([part.mean(0) for part in row.split(sizes)])
        for row, sizes in zip(x, lengths, strict=True)
    ]
    mean = grid.mean(x)
    torch.testing.assert_close(mean[0], expected[0])
    torch.testing.assert_close(mean[1, :5], expected[1])
    assert not mean[1, 5].any()
    assert grid.real.tolist() == [[True] * 6, [True] * 4 + [False] * 2]


@pytest.mark.parametrize("counterfactual", [False, True])
def test_gradients_are_straight_through(counterfactual):
    """softmax's, as if the branch not taken had gradient 0 unless counterfactual."""
    grid = chunk_grid(SequenceInfo.from_lengths([[24]]), CHUNK)
    router, mean = make_router(temperature=0.5, counterfactual=counterfactual), means(grid)
    keep, write = router(mean, grid)
    assert keep.unique().tolist() == [0, 1] and torch.equal(keep + write, torch.ones_like(keep))
    outer = draw(2, *keep.shape)
    got = torch.autograd.grad((outer * torch.stack((keep, write))).sum(), mean)
    logits = (mean @ router.weight.mT).unflatten(-1, (HEADS, 2))
    assert torch.equal(logits.argmax(-1) == 0, keep == 1)
    soft = (logits / 0.5).softmax(-1)
    if not counterfactual:
        outer = outer * torch.stack((keep, write)).detach()
    expected = torch.autograd.grad((outer * soft.movedim(-1, 0)).sum(), mean)
    torch.testing.assert_close(got, expected)


def test_counts_tokens_once_per_backward_and_no_padding():
    grid, router = chunk_grid(INFO, CHUNK), make_router()
    mean = means(grid)
    with torch.no_grad():
        router(mean, grid)
    assert not router.counts.any()
    keep, write = checkpoint(lambda x: tuple(router(x, grid)), mean, use_reentrant=False)
    (keep.sum() + write.sum()).backward()
    tokens = (grid.length * grid.real).unsqueeze(-1)
    kept = (keep.detach() * tokens).sum((0, 1))
    expected = torch.stack((kept, 36 - kept), dim=-1).flatten().long()
    taken, margins = router.counts.split([2 * HEADS, len(router.counts) - 2 * HEADS])
    assert torch.equal(taken, expected) and 0 < kept[0] < 36
    assert margins[len(margins) // 2 :].sum() == kept.sum() and margins.sum() == 36 * HEADS
    torch.testing.assert_close(router.share(router.counts), kept.float() / 36)


@pytest.mark.parametrize("scale", [0.01, 1, 30])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_the_bias_brings_logits_of_any_size_to_the_target(scale, target):
    grid = chunk_grid(SequenceInfo.from_lengths([[400]]), CHUNK)
    router = make_router(target=target)
    mean = (scale * (means(grid).detach() + draw(WIDTH))).requires_grad_()  # heads far apart
    for _ in range(60):
        keep, write = router(mean, grid)
        (keep.sum() + write.sum()).backward()
        router.update_bias(router.counts, 0.1)
        router.counts.zero_()
    assert abs(float(keep.detach().mean()) - target) < 0.02


def test_a_target_is_held_while_logits_drift():
    """The trend keeps up with them; half steps alone would stay three points behind."""
    grid = chunk_grid(SequenceInfo.from_lengths([[400]]), CHUNK)
    router, mean, shares = make_router(target=0.3), means(grid), []
    for step in range(80):
        keep, write = router(mean + 0.5 * step * draw(WIDTH), grid)
        (keep.sum() + write.sum()).backward()
        shares.append(float(keep.detach().mean()))
        router.update_bias(router.counts, 0.1)
        router.counts.zero_()
    assert shares[-40:] == pytest.approx([0.3] * 40, abs=0.015)


def test_a_target_is_held_while_a_layer_learns():
    mixer = make_mixer("nats_l", chunk=4, head_dim=8, softmax_target=0.25)
    router, info = mixer.router, SequenceInfo.from_lengths([[128]] * 2)
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(mixer.parameters(), lr=0.01, betas=(0.9, 0.95))
    shares = []
    for _ in range(60):
        x = torch.randn(2, 128, 24, generator=generator, dtype=torch.float64) + 1
        optimiser.zero_grad()
        (mixer(x, info)[:, 8:] - x[:, :-8]).square().mean().backward()
        optimiser.step()
        shares.append(float(router.share(router.counts).mean()))
        router.update_bias(router.counts, 0.1)
        router.counts.zero_()
    assert router.bias < -1  # off by so much without it
    assert sum(shares[-30:]) / 30 == pytest.approx(0.25, abs=0.03)


def test_ranks_together_move_the_bias_as_one_does():
    """To the bit: what they add up are integers."""
    router, parts = make_router(target=0.3), []
    whole = chunk_grid(SequenceInfo.from_lengths([[40, 23]]), CHUNK)
    mean = means(whole)
    for lengths, chunks in (([40], slice(0, 10)), ([23], slice(10, 16)), ([40, 23], slice(0, 16))):
        router.counts.zero_()
        grid = chunk_grid(SequenceInfo.from_lengths([lengths]), CHUNK)
        keep, write = router(mean[:, chunks], grid)
        (keep.sum() + write.sum()).backward()
        parts.append(router.counts.clone())
    assert torch.equal(parts[0] + parts[1], parts[2])


def test_without_a_target_or_tokens_the_bias_stays():
    for router, count in ((make_router(), 1), (make_router(target=0.3), 0)):
        router.update_bias(torch.full_like(router.counts, count), 0.1)
        assert not router.bias.any() and not router.trend.any()


def test_a_repeated_pass_takes_the_choices_again():
    grid = chunk_grid(SequenceInfo.from_lengths([[400]]), CHUNK)
    router, choices = make_router(), Choices()
    with choices.kept():
        first = router(means(grid), grid)
    with choices.kept():
        again = router(-means(grid), grid)
    assert torch.equal(first.keep, again.keep)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("strided", [False, True])
def test_static_routing_keeps_its_share_at_the_same_places_of_every_document(share, strided):
    router = StaticRouter(num_heads=HEADS, share=share, strided=strided)
    grid = chunk_grid(SequenceInfo.from_lengths([[2000, 2000]]), CHUNK)
    keep, write = router(means(grid), grid)
    assert torch.equal(keep + write, torch.ones_like(keep))
    assert torch.equal(keep[:, :500], keep[:, 500:])
    assert (keep.mean((0, 1)) - share).abs().max() <= (1e-12 if strided else 0.06)
    if not strided and 0 < share < 1:
        assert not torch.equal(keep[..., 0], keep[..., 1])
        other = StaticRouter(num_heads=HEADS, share=share, strided=False)
        other.reset_salt()
        assert not torch.equal(keep, other(means(grid), grid).keep)


def test_the_cache_holds_kept_chunks_alone():
    """Of each head its own ones, in as many slots as the fullest needs."""
    mixer = make_mixer("nats_l", chunk=8, router="random", static_share=0.4)
    cache: dict[str, Tensor] = {}
    x = draw(1, 84, 24)
    mixer(x[:, :50], SequenceInfo.span(1, 0, 50), cache)
    mixer(x[:, 50:], SequenceInfo.span(1, 50, 84), cache)
    grid = chunk_grid(SequenceInfo.span(1, 0, 80), 8)
    keep = mixer.router(grid.mean(x[:, :80]), grid).keep[0].T  # [2 heads, 10 chunks]
    kept = [(8 * head.nonzero().flatten()).tolist() for head in keep.repeat_interleave(2, 0)]
    slots = max(map(len, kept))
    assert 0 < slots < 10 and cache["kept_k"].shape == (1, 4, slots, 8, 32)
    padded = [row + [ABSENT] * (slots - len(row)) for row in kept]
    assert cache["kept_start"][0].tolist() == padded
    assert cache["open_k"].shape[1] == 84 - 80


def test_latents_are_cached_once_for_the_heads_that_share_them():
    mixer = make_mixer("nats_l", chunk=8, latent_rank=6, router="strided", static_share=0.5)
    cache: dict[str, Tensor] = {}
    mixer(draw(1, 64, 24), SequenceInfo.span(1, 0, 64), cache)
    assert cache["kept_k"].shape == (1, 2, 4, 8, 6) and "kept_v" not in cache


def test_heads_route_differently_and_own_head_counts():
    mixer = make_mixer("nats_l", chunk=8)
    info = SequenceInfo.from_lengths([[80]])
    mixer(draw(1, 80, 24), info).sum().backward()
    kept, written = mixer.router.counts[:4].unflatten(0, (2, 2)).unbind(1)
    assert (kept + written).tolist() == [80, 80]
    assert kept[0] != kept[1]


def test_what_cannot_be_is_named():
    for keywords, message in [
        ({"chunk": 48}, "chunk is 48; it must be a power of two"),
        ({"softmax_heads": 3}, "softmax_heads is 3; it must be a multiple of num_heads = 2"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"softmax_target": 1.5}, "softmax_target is 1.5; it must be 0 to 1, or null"),
        ({"router": "random", "static_share": 2.0}, "static_share is 2.0; it must be 0 to 1"),
        ({"router": "fixed"}, "router"),
        ({"own_chunk": "none"}, "own_chunk"),
        ({"rope_base": -1.0}, "rope_base is -1"),
        ({"latent_rank": 0}, "latent_rank is 0"),
        ({"rope_factor": 4.0}, "rope_factor is 4.0; it needs a rope_base"),
        ({"static_share": 0.6}, "static_share is 0.6 with router learned; it needs random or str"),
        *(
            ({"router": "random", key: value}, f"{key} is {value} with router random; it needs lea")
            for key, value in (
                ("softmax_target", 0.6),
                ("temperature", 2.0),
                ("router_grad", "counterfactual"),
            )
        ),
        ({"latent_rank": 8, "rope_base": 1e4}, "rope_base is 10000.0 with latent_rank 8; latents"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_mixer("nats_l", **keywords)
