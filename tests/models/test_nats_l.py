"""NAtS-L against its steps written out, token by token and head by head: arXiv 2602.03681."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mixers.nats_l import NeuralAttentionSearch
from models.sequence import SequenceInfo
from tests.models.build import make_mixer

CHUNK, HEADS, SOFTMAX_HEADS = 4, 2, 6


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
        keys = torch.stack([rms(row, mixer.k_norm.weight) for row in heads[1]])
        governor = a * HEADS // SOFTMAX_HEADS
        seen = attention(queries, keys, heads[2], [chunk[governor] for chunk in keep])
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


def test_the_layer_is_its_steps_written_out():
    sizes = {"num_heads": HEADS, "softmax_heads": SOFTMAX_HEADS, "head_dim": 12, "chunk": CHUNK}
    mixer = make_mixer("nats_l", **sizes)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(27, 24, generator=generator, dtype=torch.float64)
    decisions = [chunk[:HEADS] for chunk in kept(mixer, x)]
    assert [True, False] in decisions or [False, True] in decisions  # heads differ
    expected = by_hand(mixer, x)
    got = mixer(x.unsqueeze(0), SequenceInfo.span(1, 0, 27))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
