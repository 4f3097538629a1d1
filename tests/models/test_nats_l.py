"""NAtS-L against its steps written out, token by token and head by head: arXiv 2602.03681."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.mixers.nats_l import NeuralAttentionSearch
from models.ops.routed_grid import ChunkGrid
from models.ops.routed_softmax import DenseRoutedAttention
from models.sequence import SequenceInfo
from tests.helpers import assert_equal, outputs_and_gradients
from tests.models.build import make_mixer

CHUNK, HEADS, SOFTMAX_HEADS = 4, 2, 6
SIZES = {"num_heads": HEADS, "softmax_heads": SOFTMAX_HEADS, "head_dim": 12, "chunk": CHUNK}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum() + 1e-6).sqrt()


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """[T, channels], the newest tap last."""
    width = taps.shape[1]
    rows = [
        sum(taps[:, width - 1 - lag] * x[t - lag] for lag in range(min(width, t + 1)))
        for t in range(len(x))
    ]
    return F.silu(torch.stack(rows))


def kept(mixer: NeuralAttentionSearch, x: Tensor) -> list[list[bool]]:
    """By chunk and head: its mean input prefers softmax attention."""
    logits = [mixer.router.weight @ part.mean(0) for part in x.split(CHUNK)]
    return [[bool(z[2 * h] >= z[2 * h + 1]) for h in range(HEADS)] for z in logits]


def attention(q: Tensor, k: Tensor, v: Tensor, keep: list[bool]) -> Tensor:
    """One head, [T, dim]: the own chunk, and earlier ones that are kept."""
    outputs = []
    for t in range(len(q)):
        seen = [j for j in range(t + 1) if j // CHUNK == t // CHUNK or keep[j // CHUNK]]
        scores = torch.stack([q[t] @ k[j] for j in seen]) * q.shape[1] ** -0.5
        outputs.append(scores.softmax(0) @ v[seen])
    return torch.stack(outputs)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, keep: list[bool]
) -> Tensor:
    """One head, [T, dim]; a kept chunk's writes are dropped at its end, its decay is not."""
    state = untouched = q.new_zeros(k.shape[1], v.shape[1])
    outputs = []
    for t in range(len(q)):
        if t and t % CHUNK == 0:
            state = untouched = untouched if keep[t // CHUNK - 1] else state
        decay, key = log_decay[t].exp(), unit(k[t])
        state, untouched = decay * state, decay * untouched
        state = state + beta[t] * torch.outer(key, v[t] - key @ state)
        outputs.append(unit(q[t]) * k.shape[1] ** -0.5 @ state)
    return torch.stack(outputs)


def keys_and_values(
    mixer: NeuralAttentionSearch, x: Tensor, k: Tensor, v: Tensor, head: int
) -> tuple[Tensor, Tensor]:
    """Of a softmax head, [T, dim]; k, v: those that it has without latents."""
    if mixer.latent_rank is None:
        return torch.stack([rms(row, mixer.k_norm.weight) for row in k]), v
    latents = (x @ mixer.latent_down.weight.mT).chunk(HEADS, dim=1)
    latent = latents[head * HEADS // SOFTMAX_HEADS]
    latent = torch.stack([rms(row, mixer.latent_norm.weight) for row in latent])
    up = mixer.latent_up.weight.chunk(SOFTMAX_HEADS)[head]
    return latent @ up[: k.shape[1]].mT, latent @ up[k.shape[1] :].mT


def by_hand(mixer: NeuralAttentionSearch, x: Tensor) -> Tensor:
    mixed = convolved(x @ mixer.qkv_proj.weight.mT, mixer.conv_weight)
    q, k, v = mixed.split(mixer.widths, dim=1)
    keep = kept(mixer, x)
    gate = mixer.decay.gate
    log_decay = -gate.log_rate.exp() * F.softplus(x @ mixer.decay.proj.weight.mT + gate.bias)
    beta = (x @ mixer.beta_proj.weight.mT).sigmoid()
    states = [
        recurrence(*heads, log_decay[:, h], beta[:, h], [chunk[h] for chunk in keep])
        for h, heads in enumerate(zip(*(y.chunk(HEADS, 1) for y in (q, k, v)), strict=True))
    ]
    by_state = torch.cat(states, dim=1).chunk(SOFTMAX_HEADS, dim=1)
    weights = (q @ mixer.mixing_proj.weight.mT).unflatten(1, (SOFTMAX_HEADS, 2)).softmax(-1)
    outputs = []
    for a, heads in enumerate(zip(*(y.chunk(SOFTMAX_HEADS, 1) for y in (q, k, v)), strict=True)):
        queries = torch.stack([rms(row, mixer.q_norm.weight) for row in heads[0]])
        keys, values = keys_and_values(mixer, x, *heads[1:], a)
        governor = a * HEADS // SOFTMAX_HEADS
        seen = attention(queries, keys, values, [chunk[governor] for chunk in keep])
        outputs.append(
            torch.stack(
                [
                    w[0] * rms(y, mixer.softmax_norm.weight)
                    + w[1] * rms(s, mixer.linear_norm.weight)
                    for w, y, s in zip(weights[:, a], seen, by_state[a], strict=True)
                ]
            )
        )
    gated = torch.cat(outputs, dim=1) * F.silu(x @ mixer.gate_proj.weight.mT)
    return gated @ mixer.out_proj.weight.mT


@pytest.mark.parametrize("latent_rank", [None, 5])
def test_the_layer_is_its_steps_written_out(latent_rank):
    mixer = make_mixer("nats_l", latent_rank=latent_rank, **SIZES)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(27, 24, generator=generator, dtype=torch.float64)
    decisions = [chunk[:HEADS] for chunk in kept(mixer, x)]
    assert [True, False] in decisions or [False, True] in decisions  # heads differ
    expected = by_hand(mixer, x)
    got = mixer(x.unsqueeze(0), SequenceInfo.span(1, 0, 27))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def materialised(
    mixer: NeuralAttentionSearch,
    x: Tensor,
    qkv: list[Tensor],
    keep: Tensor,
    grid: ChunkGrid,
    info: SequenceInfo,
    cache: None,
) -> Tensor:
    """The softmax half with keys and values projected from the latents, by the definition."""
    group = SOFTMAX_HEADS // HEADS
    q = mixer.q_norm(qkv[0].unflatten(-1, (SOFTMAX_HEADS, -1)))
    latent = mixer.latent_norm(mixer.latent_down(x).unflatten(-1, (HEADS, -1)))
    up = mixer.latent_up.weight.unflatten(0, (SOFTMAX_HEADS, -1))
    kv = torch.einsum("bsar,adr->bsad", latent.repeat_interleave(group, dim=2), up)
    k, v = kv.split([q.shape[-1], kv.shape[-1] - q.shape[-1]], dim=-1)
    keep = grid.spread(keep.repeat_interleave(group, dim=-1))
    return DenseRoutedAttention(chunk=CHUNK, counterfactual=True)(q, k, v, keep, info)


def test_attention_to_latents_is_that_to_their_keys_and_values():
    """The router's gradients, too."""
    info = SequenceInfo.from_lengths([[27, 9], [14]], padding=[0, 22])
    found = []
    for attend in (NeuralAttentionSearch._attend, materialised):
        mixer = make_mixer("nats_l", latent_rank=5, router_grad="counterfactual", **SIZES)
        mixer._attend = MethodType(attend, mixer)
        x = torch.randn(2, 36, 24, generator=torch.Generator().manual_seed(1)).double()
        leaves = [x.requires_grad_(), *mixer.parameters()]
        found.append(outputs_and_gradients(lambda x, *_, m=mixer: m(x, info), leaves))
        assert all(grad.abs().max() > 1e-6 for grad in found[-1])
    assert_equal(*found, 1e-10)


def test_flops_and_state_of_latents():
    plain, latent = (make_mixer("nats_l", latent_rank=rank, **SIZES) for rank in (None, 5))
    per_key = {plain: 24 + 48, latent: 2 * SOFTMAX_HEADS * 5}  # keys and values of all heads
    cached = {plain: 24 + 48, latent: HEADS * 5}
    for mixer in (plain, latent):
        seen = mixer.router.expected_share * 1000
        more = mixer.flops_per_token(1000) - mixer.flops_per_token(0)
        assert more == 2 * seen * per_key[mixer]
        chunk = mixer.state_elements(CHUNK) - mixer.state_elements(0)
        assert chunk == CHUNK * cached[mixer] + (SOFTMAX_HEADS if mixer is plain else HEADS)
    widths = latent.flops_per_token(0) - plain.flops_per_token(0)
    own = CHUNK / 2 * (per_key[latent] - per_key[plain])
    assert widths == 2 * (own + 24 * HEADS * 5 + SOFTMAX_HEADS * (4 + 8) * 5)
