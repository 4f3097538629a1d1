"""The assembled model: patterns, presets, initialisation, checkpoint keys, decoding."""

import pytest
import torch

from models.hybrid import HybridLM
from models.sequence import SequenceInfo
from tests.models.build import MODELS, make_model, randomise
from trainer.errors import ConfigError

TINY = [
    "model.d_model=16",
    "model.ffn.hidden=24",
    "model.moe.hidden=8",
    "model.moe.shared_hidden=8",
    "mixer.kda.head_dim=8",
    "mixer.mla.kv_rank=12",
]


def tiny(name: str, *overrides: str) -> HybridLM:
    model = make_model([f"model={name}", *TINY, *overrides], device="cpu").double()
    return randomise(model)


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_builds_on_the_meta_device(name):
    model = make_model([f"model={name}"])
    assert model.active_parameters() <= sum(p.numel() for p in model.parameters())
    assert (
        model.flops_per_token(1000.0)
        > 2 * model.active_parameters() - 2 * model.embed.weight.numel()
    )


def test_kimi_linear_48b_has_the_published_parameters():
    """Counted from the table of released shapes: reference figures, not our code."""
    d, layers, dense, vocab = 2304, 27, 1, 163840
    kda = 3 * 4096 * d + 3 * 4096 * 4 + 32 + 4096 + 2 * (128 * d + 4096 * 128) + 32 * d + 128
    kda += d * 4096
    mla = 6144 * d + 576 * d + 512 + 8192 * 512 + d * 4096
    moe = 256 * 3 * 1024 * d + 256 * d + 3 * 1024 * d
    total = 20 * kda + 7 * mla + dense * 3 * 9216 * d + (layers - dense) * moe
    total += layers * 2 * d + d + 2 * vocab * d
    model = make_model(["model=kimi_linear_48b"])
    assert sum(p.numel() for p in model.parameters()) == total
    assert 48e9 < total < 50e9
    assert 3.0e9 < model.active_parameters() < 3.6e9
    full_attention = [i + 1 for i, name in enumerate(model.pattern) if name == "mla"]
    assert full_attention == [4, 8, 12, 16, 20, 24, 27]


def test_baselines_are_of_equal_size():
    sizes = {
        name: sum(p.numel() for p in make_model([f"model={name}"]).parameters())
        for name in ("kimi_linear", "transformer", "mla")
    }
    assert max(sizes.values()) < 1.1 * min(sizes.values()), sizes


@pytest.mark.parametrize("name", ["kimi_linear", "kimi_linear_attnres", "transformer", "mla"])
def test_every_parameter_is_initialised_and_trained(name):
    model = make_model([f"model={name}", *TINY], device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.reset_parameters()
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), key
        assert (tensor >= 0).all() or tensor.is_floating_point(), key
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    model = randomise(model)
    tokens = torch.randint(0, 320, (2, 70), generator=torch.Generator().manual_seed(1))
    model(tokens, SequenceInfo.from_lengths([[70], [30, 40]])).square().sum().backward()
    for key, parameter in model.named_parameters():
        if key != "head.weight" and ".experts." not in key:  # the head is the caller's to apply
            first = key.startswith("layers.0.mixer_residual")  # reads one source: nothing to weigh
            assert first or parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["kimi_linear", "kimi_linear_attnres", "transformer", "mla"])
def test_decoding_equals_the_full_forward(name):
    model = tiny(name)
    tokens = torch.randint(0, 320, (2, 75), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, SequenceInfo.span(2, 0, 75))
    caches: list[dict] = [{} for _ in model.layers]
    steps = [(0, 67), *((t, t + 1) for t in range(67, 75))]
    outputs = [
        model(tokens[:, start:stop], SequenceInfo.span(2, start, stop), caches)
        for start, stop in steps
    ]
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["kimi_linear", "kimi_linear_attnres"])
def test_packed_documents_equal_documents_alone(name):
    model = tiny(name)
    lengths = [3, 65, 1, 20]
    tokens = torch.randint(0, 320, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    packed = model(tokens, SequenceInfo.from_lengths([lengths]))
    alone = [
        model(part, SequenceInfo.span(1, 0, part.shape[1])) for part in tokens.split(lengths, 1)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-10)


def test_pattern_repeats_over_the_layers():
    model = make_model(["model.pattern=[kda,gqa,mla]", "model.num_layers=5"])
    assert model.pattern == ["kda", "gqa", "mla", "kda", "gqa"]


def test_tied_embeddings_share_one_tensor():
    model = make_model(["model.tie_embeddings=true"])
    assert model.head_weight is model.embed.weight
    assert "head.weight" not in model.state_dict()


def test_checkpoint_keys_do_not_depend_on_the_ops():
    chosen = make_model(["model=kimi_linear"]).state_dict().keys()
    definition = make_model(["model=kimi_linear", "ops=reference"]).state_dict().keys()
    assert chosen == definition


def test_a_model_may_do_without_feed_forward_layers():
    model = make_model(["model=mamba2"])
    names = set(model.layers[0].state_dict())
    assert names == {
        "mixer_norm.weight",
        *(f"mixer.{name}" for name in model.layers[0].mixer.state_dict()),
    }
    mixers = sum(layer.mixer.flops_per_token(9) for layer in model.layers)
    assert model.flops_per_token(9) == mixers + 2 * model.head_weight.numel()
    assert model.active_parameters() == sum(p.numel() for p in model.parameters())
    blocks = make_model(["model=mamba2", "model.residual_block=2"])
    assert [layer.mixer_residual.opens_block for layer in blocks.layers] == [True, False] * 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pattern=[kda,mamba9]", "mamba9"),
        ("model.pattern=[]", "pattern is empty"),
        ("model.num_layers=0", "num_layers is 0"),
        ("model.moe.top_k=9", "top_k is 9"),
        ("model.d_model=0", "d_model is 0"),
        ("model.init_std=-1", "init_std is -1"),
        ("model.norm_eps=-1", "norm_eps is -1"),
        ("model.moe.shared_hidden=-1", "shared_hidden is -1"),
        ("mixer.gqa.rope_base=0 model=transformer", "rope_base is 0"),
        ("+mixer.gqa.rope_scaling.factor=8 model=transformer", "rope_scaling is {'factor': 8}"),
        ("mixer.mla.rope_frequencies=[1.0,0.1]", r"mixer\.mla\.rope_frequencies are 2; 16 rotary"),
        ("model.ffn.hidden=-4", "hidden is -4"),
        ("model.ffn=null", "model.ffn is null and moe is not"),
        ("mixer.gqa.window=0 model=transformer", r"mixer\.gqa\.window is 0; it must be at least 1"),
        ("mixer.kda.num_heads=0", "num_heads is 0"),
        ("model.residual_block=0", "residual_block is 0"),
    ],
)
def test_bad_models_are_refused_in_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_model(override.split())
    assert "\n" not in str(error.value)
