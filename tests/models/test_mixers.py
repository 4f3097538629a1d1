"""Laws that every mixer in conf/mixer keeps: a new file there is tested by existing."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.mixer import Mixer
from models.sequence import SequenceInfo
from tests.models.build import MIXERS, REFERENCE, make_mixer
from trainer.errors import ConfigError

PACKINGS = [[[90], [90]], [[1, 2, 61, 26], [64, 26]]]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPTIONS = [
    ("gqa", {"qk_norm": True, "output_gate": True, "rope_base": None}),
    ("gqa", {"window": 7}),
    ("gqa", {"window": 1}),
    ("gqa", {"qkv_bias": True, "out_bias": True, "rope_scaling": LLAMA3}),
    ("mla", {"rope_base": 10_000.0, "q_rank": 16, "output_gate": True}),
    ("mla", {"num_kv_heads": 2, "latent_norm": False, "bias": True, "scale": 0.3}),
    ("mla", {"q_rank": 16, "bias": True, "nope_dim": 0}),
    ("mla", {"rope_frequencies": [0.5**i for i in range(8)]}),
    ("kda", {"gate_lower_bound": -5.0, "full_rank_gate": True}),
    ("kda", {"conv_width": 1}),
    ("mamba2", {"num_kv_heads": 2, "num_groups": 8, "state_dim": 32, "conv_bias": False}),
    ("mamba2", {"num_groups": 4, "step_min": 0.3, "step_max": 0.8}),
    ("mfa", {"rope_base": None}),
    ("gdn", {"num_key_heads": 2, "negative_eigenvalues": True, "expand_v": 0.5}),
    ("nats_l", {"chunk": 16}),
    ("nats_l", {"chunk": 8, "linear": "kda", "rope_base": 100.0, "mixing_from": "x"}),
    ("nats_l", {"chunk": 16, "router_grad": "counterfactual", "negative_eigenvalues": True}),
    ("nats_l", {"chunk": 16, "own_chunk": "softmax", "temperature": 0.5}),
    ("nats_l", {"chunk": 16, "own_chunk": "linear", "decay_softmax_chunks": False}),
    ("nats_l", {"chunk": 8, "latent_rank": 6}),
    ("nats_l", {"chunk": 8, "router": "strided", "static_share": 0.4}),
    ("nats_l", {"chunk": 8, "router": "random", "static_share": 0.4}),
]
EXACT = {"rtol": 0, "atol": 1e-11}


def make_input(batch: int, seq: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, seq, 24, generator=generator, dtype=torch.float64)


def forward_backward(mixer: Mixer, x: Tensor, info: SequenceInfo) -> dict[str, Tensor]:
    """Output and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    output = mixer(x, info)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    grads = torch.autograd.grad(output, [x, *mixer.parameters()], grad)
    return {"output": output, **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("rows", PACKINGS, ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_fast_ops_equal_the_definitions(name, rows):
    x, info = make_input(2, 90), SequenceInfo.from_lengths(rows)
    fast = forward_backward(make_mixer(name), x, info)
    definition = forward_backward(make_mixer(name, REFERENCE), x, info)
    torch.testing.assert_close(fast, definition, **EXACT)


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_sees_the_future(name):
    x, info = make_input(1, 90), SequenceInfo.from_lengths([[90]])
    mixer = make_mixer(name)
    changed = x.clone()
    changed[:, 70:] += 1.0
    before, after = mixer(x, info), mixer(changed, info)
    torch.testing.assert_close(before[:, :70], after[:, :70], rtol=0, atol=1e-12)
    assert (before[:, 70:] - after[:, 70:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_equal_documents_alone(name):
    lengths = [5, 1, 70, 14]
    x = make_input(1, sum(lengths))
    mixer = make_mixer(name)
    packed = mixer(x, SequenceInfo.from_lengths([lengths]))
    alone = [mixer(part, SequenceInfo.span(1, 0, part.shape[1])) for part in x.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


@pytest.mark.parametrize(("name", "keywords"), [*((name, {}) for name in MIXERS), *OPTIONS])
def test_decoding_equals_the_whole_and_caches_what_it_says(name, keywords):
    x = make_input(2, 40)
    mixer = make_mixer(name, **keywords)
    whole = mixer(x, SequenceInfo.span(2, 0, 40))
    cache: dict[str, Tensor] = {}
    outputs = [
        mixer(x[:, start:stop], SequenceInfo.span(2, start, stop), cache)
        for start, stop in [(0, 2), (2, 30), *((t, t + 1) for t in range(30, 40))]
    ]
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
    cached, said = sum(x.numel() for x in cache.values()), 2 * mixer.state_elements(40)
    assert cached <= said if name == "nats_l" else cached == said  # who keeps what the data say


def test_the_convolution_history_does_not_keep_the_prompt():
    cache: dict[str, Tensor] = {}
    make_mixer("kda")(make_input(1, 40), SequenceInfo.span(1, 0, 40), cache)
    assert cache["conv"].untyped_storage().nbytes() == cache["conv"].nbytes


@pytest.mark.parametrize(("name", "keywords"), OPTIONS)
def test_options_keep_the_laws_and_reach_every_parameter(name, keywords):
    x, info = make_input(2, 90), SequenceInfo.from_lengths(PACKINGS[1])
    fast = forward_backward(make_mixer(name, **keywords), x, info)
    definition = forward_backward(make_mixer(name, REFERENCE, **keywords), x, info)
    torch.testing.assert_close(fast, definition, **EXACT)
    assert all(value.abs().max() > 0 for value in fast.values())


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("gqa", {}), ("mla", {}), ("mla", {"num_kv_heads": 1, "nope_dim": 0}), ("mfa", {})],
)
def test_flops_are_those_of_the_matrix_products(name, keywords):
    """The definition multiplies whole rows, so that every token sees the full context."""
    mixer = make_mixer(name, REFERENCE, **keywords)
    with FlopCounterMode(display=False) as counter:
        mixer(make_input(1, 32), SequenceInfo.span(1, 0, 32))
    assert counter.get_total_flops() == 32 * mixer.flops_per_token(32)


STATE_FLOPS = {
    # q, k, v, decay, beta, gate and output; the delta rule reads a state, writes to it and asks it
    "kda": 24 * (3 * 16 + 8 + 2 + 8 + 16) + 2 * 8 * 16 + 3 * 16 * 4 + 3 * 2 * 8 * 8,
    "gdn": 24 * (2 * 16 + 32 + 2 + 2 + 2 * 32) + 64 * 4 + 3 * 2 * 8 * 16,
    # z, x, B, C, step and output; written to and asked
    "mamba2": 24 * (2 * 16 + 2 * 64 + 2 + 16) + (16 + 2 * 64) * 4 + 2 * 2 * 8 * 64,
    "lightning": 24 * 5 * 16 + 2 * 2 * 8 * 8,
}


@pytest.mark.parametrize("name", STATE_FLOPS)
def test_flops_of_recurrent_mixers_count_the_state_and_no_context(name):
    mixer = make_mixer(name, num_heads=2, head_dim=8)
    assert mixer.flops_per_token(10) == mixer.flops_per_token(1000)
    assert mixer.flops_per_token(10) == 2 * STATE_FLOPS[name]


@pytest.mark.parametrize(
    ("name", "part"), [("kda", "decay.gate"), ("gdn", "decay.gate"), ("mamba2", "time_step")]
)
def test_initial_decays_are_those_of_the_paper(name, part):
    gate = make_mixer(name, num_heads=512, head_dim=4).get_submodule(part)
    gate.reset_parameters(0.02)
    rate, step = gate.log_rate.exp(), torch.nn.functional.softplus(gate.bias)
    assert 1 <= rate.min() < 1.2 and 15.8 < rate.max() <= 16
    assert 0.9e-3 < step.min() < 1.2e-3 and 0.09 < step.max() < 0.11
    assert 0.8e-2 < step.median() < 1.25e-2  # log-uniform


def test_a_bounded_gate_starts_at_rate_one():
    bounded = make_mixer("kda", gate_lower_bound=-5.0).decay.gate
    bounded.reset_parameters(0.02)
    assert not bounded.log_rate.any()


def test_bounded_gate_stays_above_its_bound_and_is_not_a_clamp():
    gate = make_mixer("kda", gate_lower_bound=-5.0).decay.gate
    logits = torch.linspace(-30, 30, 256, dtype=torch.float64).view(1, 1, 4, 64)
    log_decay = gate(logits)
    assert log_decay.min() >= -5.0
    assert log_decay.max() <= 0.0
    z = logits + gate.bias.view(4, 64)
    expected = -5.0 / (1.0 + torch.exp(-gate.log_rate.exp()[:, None] * z))
    torch.testing.assert_close(log_decay, expected)


@pytest.mark.parametrize("name", ["kda", "gdn", "mamba2", "lightning"])
def test_gates_stay_wide_under_autocast(name):
    mixer, seen = make_mixer(name).float(), []
    mixer.recurrence.register_forward_pre_hook(lambda op, args: seen.extend(args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixer(make_input(1, 5).float(), SequenceInfo.span(1, 0, 5))
    _, _, v, log_decay, beta, _ = seen
    assert v.dtype == torch.bfloat16
    assert log_decay.dtype == beta.dtype == torch.float32


def test_wrong_sizes_are_named():
    with pytest.raises(ConfigError, match="num_kv_heads is 3; it must divide num_heads = 4"):
        make_mixer("gqa", num_kv_heads=3)
    with pytest.raises(ConfigError, match="num_kv_heads is 3; it must divide num_heads = 4"):
        make_mixer("mla", num_kv_heads=3)
    with pytest.raises(ConfigError, match="num_key_heads is 3; it must divide num_heads = 4"):
        make_mixer("gdn", num_key_heads=3)
    with pytest.raises(ConfigError, match=r"expand_v is 1\.01; times head_dim = 32"):
        make_mixer("gdn", expand_v=1.01)
    with pytest.raises(ConfigError, match="num_groups is 3; it must divide num_heads = 8"):
        make_mixer("mamba2", num_groups=3)
    with pytest.raises(ConfigError, match=r"steps from 0.5 to 0.1; they must be at least 0, and"):
        make_mixer("mamba2", step_min=0.5, step_max=0.1)
    with pytest.raises(ConfigError, match="gate_lower_bound is 5"):
        make_mixer("kda", gate_lower_bound=5.0)
