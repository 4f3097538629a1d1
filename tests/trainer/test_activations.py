"""Rounded and offloaded activations in whole models: how wrong gradients get, what is saved."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.measure import kept_bytes
from models.hybrid import HybridLM
from models.ops.experts import GroupedExperts
from parallel.activation_checkpoint import apply_activation_checkpointing
from parallel.activation_storage import apply_activation_storage
from parallel.block_scaled import BlockScaled, Format
from parallel.collectives import Axis, sum_over_ranks
from parallel.layout import plan_layout
from parallel.mesh import Mesh
from parallel.offload import Offload
from tests.models.build import MIXERS, compose, make_model
from tests.parallel.ranks import on_ranks
from trainer.activations import ROUNDED, store_activations
from trainer.batch import Batch, Run
from trainer.build import share_sequences
from trainer.construct import call
from trainer.errors import ConfigError
from trainer.loss import LanguageModelLoss
from trainer.settings import Parallelism, Settings

SEQ = 160  # two ranks have enough tokens each for tensors that are worth rounding
SIZES = [
    "model.d_model=64",
    "model.ffn.hidden=64",
    "model.moe={num_experts: 4, top_k: 2, hidden: 32, shared_hidden: 32, routed_scaling: 2.0}",
    "mixer.kda={num_heads: 2, head_dim: 32}",
    "mixer.mla={num_heads: 2, kv_rank: 32, nope_dim: 16, rope_dim: 16, v_dim: 32}",
    "mixer.gqa={num_heads: 2, num_kv_heads: 1, head_dim: 32}",
    "mixer.mfa={num_heads: 2, head_dim: 32, q_rank: 32}",
    "mixer.gdn={num_heads: 2, head_dim: 16}",
    "mixer.mamba2={num_heads: 2, head_dim: 32, state_dim: 32}",
    "mixer.lightning={num_heads: 2, head_dim: 32}",
    "mixer.nats_l={num_heads: 2, softmax_heads: 2, head_dim: 32, expand_v: 1, chunk: 16}",
]
CHUNK = 16  # where documents may be cut
PATTERN = f"model.pattern=[{','.join(MIXERS)}]"
FORMATS: tuple[Format | None, ...] = (None, "int8")
# Twice what is seen here: the largest and the median error of a parameter's gradient.
BOUNDS = {
    ("int8", False): (0.03, 0.01),
    ("int8", True): (0.2, 0.02),
    ("fp8", False): (0.1, 0.04),
    ("fp8", True): (0.7, 0.09),
}


def model(*more: str, dtype: torch.dtype = torch.float64) -> HybridLM:
    made = make_model([*SIZES, PATTERN, f"model.num_layers={len(MIXERS)}", *more], device="cpu")
    torch.manual_seed(0)
    made.reset_parameters()
    return made.to(dtype)


def batch() -> Batch:
    tokens = torch.randint(256, (SEQ,), generator=torch.Generator().manual_seed(1)).numpy()
    return Batch.from_rows([[Run(tokens[:100]), Run(tokens[100:])]], seq_len=SEQ, pad_id=0)


def gradients(model: HybridLM, batch: Batch, autocast=None) -> dict[str, Tensor]:
    model.zero_grad()
    LanguageModelLoss(model, autocast=autocast)(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    """Of each parameter, relative to the norm of its gradient, in ascending order."""
    norms = {name: float(x.norm()) for name, x in expected.items()}
    return sorted(float((got[n] - x).norm()) / norms[n] for n, x in expected.items() if norms[n])


def store(
    model: HybridLM, format: Format | None, *, checkpointed: bool, offload: Offload | None = None
) -> HybridLM:
    if checkpointed:
        apply_activation_checkpointing(model.layers)
    kinds = None if checkpointed else ROUNDED
    apply_activation_storage(model.layers, rounding=format, rounded=kinds, offload=offload)
    return model


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    return gradients(model(), batch())


@pytest.mark.parametrize(("format", "checkpointed"), BOUNDS)
def test_how_wrong_gradients_get(exact, format, checkpointed):
    found = errors(gradients(store(model(), format, checkpointed=checkpointed), batch()), exact)
    largest, median = BOUNDS[format, checkpointed]
    assert largest / 10 < found[-1] < largest and median / 10 < found[len(found) // 2] < median


@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloading_changes_no_bit(exact, checkpointed):
    away = Offload(torch.device("cpu"), min_bytes=1024)
    got = gradients(store(model(), None, checkpointed=checkpointed, offload=away), batch())
    torch.testing.assert_close(got, exact, rtol=0, atol=0)


def test_what_is_rounded_may_be_offloaded(exact):
    both = [
        gradients(store(model(), "int8", checkpointed=False, offload=offload), batch())
        for offload in (None, Offload(torch.device("cpu"), min_bytes=1024))
    ]
    torch.testing.assert_close(both[1], both[0], rtol=0, atol=0)


def test_experts_are_those_of_the_forward():
    """bf16 fills each expert's rows up to a multiple: others would be another number of rows."""
    plain, rounded = model(dtype=torch.float32), model(dtype=torch.float32)
    chosen: list[Tensor] = []
    store(rounded, "fp8", checkpointed=True)
    experts = [module for module in rounded.modules() if isinstance(module, GroupedExperts)]
    for module in experts:
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[2]))
    expected = gradients(plain, batch(), torch.bfloat16)
    found = errors(gradients(rounded, batch(), torch.bfloat16), expected)
    assert found[len(found) // 2] < BOUNDS["fp8", True][1]
    layers = len(experts)
    assert len(chosen) == 2 * layers
    for forward, again in zip(chosen[:layers], reversed(chosen[layers:]), strict=True):
        assert forward.equal(again)


def test_rounding_is_for_the_backward_alone(monkeypatch):
    """Neither in evaluation nor in what the forward returns; and it takes memory away."""
    encoded = []
    encode = BlockScaled.encode
    monkeypatch.setattr(BlockScaled, "encode", lambda *args: encoded.append(1) or encode(*args))
    losses, kept = [], []
    for format, checkpointed in ((None, False), ("int8", False), ("int8", True)):
        loss = LanguageModelLoss(store(model(), format, checkpointed=checkpointed))
        value, held = kept_bytes(lambda loss=loss: loss(batch()))
        losses.append(value.detach())
        kept.append(held)
        assert bool(encoded) == (format is not None)
        encoded.clear()
        with torch.no_grad():
            assert loss(batch()) == losses[0] and not encoded
    assert losses == losses[:1] * 3
    assert kept[1] < 0.7 * kept[0] and kept[2] < 0.1 * kept[0]


def test_what_is_compiled_may_be_checkpointed_and_rounded():
    counters.clear()
    got = []
    for compiled in (False, True):
        one = model("model.pattern=[gqa]", "model.num_layers=1", "model.moe=null")
        if compiled:
            one.layers[0].forward = torch.compile(one.layers[0].forward, backend="aot_eager")
        got.append(gradients(store(one, "int8", checkpointed=True), batch()))
    assert counters["stats"]["unique_graphs"]
    torch.testing.assert_close(got[1], got[0], rtol=1e-9, atol=1e-9)


def test_ranks_may_share_sequences():
    on_ranks(2, check_ranks)


def check_ranks(axis: Axis) -> None:
    """The blocks of a rounded row are its token's own, wherever that lies."""
    one = Axis(axis.group, 0, 1, axis.traffic)
    where = {"device": torch.device("cpu"), "rank": axis.rank, "ranks": 2, "group": axis.group}
    mesh = Mesh(**where, context=axis, ulysses=one, ring=axis)
    layout = plan_layout(batch().documents(), ranks=2, strategy="zigzag", multiple=CHUNK)
    part = batch().shard(layout, axis.rank, pad_id=0)

    def shared(scheme: str, format: Format | None, **how: Any) -> dict[str, Tensor]:
        parallelism = call(Parallelism, compose([f"parallel={scheme}"])["parallel"], "parallel")
        made = model()
        share_sequences(made, parallelism, mesh)
        got = gradients(store(made, format, **how), part)
        return {name: sum_over_ranks(x, axis.group) for name, x in got.items()}

    alone, rounded = (gradients(store(model(), f, checkpointed=True), batch()) for f in FORMATS)
    away = Offload(mesh.device, min_bytes=1024)
    offloaded = shared("ring", None, checkpointed=False, offload=away)
    torch.testing.assert_close(offloaded, alone, rtol=1e-9, atol=1e-9)
    checkpointed = shared("ulysses", "int8", checkpointed=True)
    torch.testing.assert_close(checkpointed, rounded, rtol=1e-9, atol=1e-9)
    found = errors(shared("ring", "int8", checkpointed=False), alone)
    assert found[len(found) // 2] < BOUNDS["int8", False][1]


def settings(*more: str) -> Settings:
    return call(Settings, compose(list(more))["trainer"], "trainer")


def test_bad_input_is_one_line(tmp_path):
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^trainer\.activation_offload=true: the run is on cpu;"):
        store_activations([], settings("trainer.activation_offload=true"), device)
    int8 = ["trainer.activation_storage=int8", "trainer.compile=true"]
    with pytest.raises(ConfigError, match=r"^trainer\.activation_storage is int8; allowed: exact"):
        settings(*int8)
    settings(*int8, "trainer.activation_checkpointing=true")
    with pytest.raises(ConfigError, match=r"activation_storage=int4: allowed: exact, int8, fp8$"):
        settings("trainer.activation_storage=int4")
