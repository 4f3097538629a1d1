"""Every engine trains like one process, holds its share and no more, and goes on from any other.

An engine is tested on four ranks with all degrees of context parallelism by a line in ENGINES;
test_engine_matrix.py has every shape.
"""

import pytest
import torch

from models.precision import Island
from tests.models.build import make_model
from tests.trainer.runs import SINGLE, Runs, assert_same
from tests.trainer.tiny import config
from trainer.build import build_trainer
from trainer.checkpoint.convert import convert
from trainer.errors import ConfigError

MODEL = [
    "model.pattern=[kda,mla]",  # with a dense feed-forward, then a mixture
    "model.num_layers=2",
    "mixer.kda.num_heads=4",
    "mixer.mla.num_heads=4",
]
RUN = [*MODEL, "data.seq_len=48", "data.batch_size=8", "trainer.steps=3", "checkpoint.every=2"]
EXACT = "trainer.precision=fp64"
CHECKPOINTING = "trainer.activation_checkpointing=true"
CUT = "parallel.layout=zigzag"
SHAPES = {  # of four ranks: a step is one micro-batch, or two accumulated
    "cp1": ["trainer.micro_batch_size=2"],
    "cp1 accumulated": ["trainer.micro_batch_size=1", CHECKPOINTING],
    "cp2": ["parallel=ring", CUT, "parallel.cp=2", "trainer.micro_batch_size=4"],
    "cp2 accumulated": [
        *("parallel=ulysses", "parallel.cp=2", "trainer.micro_batch_size=2", CHECKPOINTING)
    ],
    "cp4": ["parallel=usp", CUT, "parallel.cp=4", "trainer.micro_batch_size=8"],
    "cp4 accumulated": ["parallel=gather", "parallel.cp=4", "trainer.micro_batch_size=4"],
}
ONCE = "engine.reduce_every_micro_batch=false"
HSDP = ["engine=fsdp2", "engine.shard_ranks=2", "engine.reshard_after_forward=false"]
ENGINES = {  # name -> overrides, how many of four ranks hold a copy of the model, and shapes
    "ddp": ([], 1, ["cp1", "cp2 accumulated"]),
    "fsdp2": (["engine=fsdp2"], 4, ["cp1 accumulated", "cp4"]),
    "hsdp": (HSDP, 2, ["cp2"]),
    "hsdp once": ([*HSDP, ONCE], 2, ["cp4 accumulated"]),
}
RUNS = [(engine, shape) for engine, (*_, shapes) in ENGINES.items() for shape in shapes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("engines"), RUN)


@pytest.fixture(scope="module")
def alone(runs) -> dict:
    return runs.alone("alone", EXACT, "trainer.micro_batch_size=8")


@pytest.fixture(scope="module")
def two(runs, alone) -> Runs:
    """Two ranks: bf16, and starting from a Hugging Face folder."""
    convert(source=str(runs.path / "alone"), target=str(runs.path / "hf"), format="hf")
    start = ["trainer.steps=1", f"init_from={runs.path / 'hf'}", "trainer.micro_batch_size=4"]
    mixed = ["trainer.precision=bf16", "trainer.micro_batch_size=2"]
    runs.alone("from hf alone", EXACT, *start)
    jobs = {
        "bf16": ["engine=fsdp2", ONCE, *mixed, CHECKPOINTING],
        "bf16 ddp": ["engine=ddp", *mixed],
        "from hf": ["engine=fsdp2", EXACT, *start],
    }
    runs.said = {2: runs.on_ranks(2, {name: ["unsaved", *more] for name, more in jobs.items()})}
    return runs


@pytest.fixture(scope="module")
def four(two) -> Runs:
    """Four ranks."""
    two_steps = ["unsaved", "trainer.steps=2", "schedule.total_steps=3"]
    marks = {"fsdp2 cp1 accumulated": ["counted", *two_steps], "hsdp cp2": []}
    jobs = {
        f"{engine} {shape}": [*ENGINES[engine][0], EXACT, *SHAPES[shape]] for engine, shape in RUNS
    }
    two.said[4] = two.on_ranks(
        4, {name: [*marks.get(name, two_steps), *words] for name, words in jobs.items()}
    )
    return two


def test_a_hugging_face_folder_goes_into_the_shards(two):
    assert_same(two.records("from hf"), two.records("from hf alone"), 1e-9)
    assert two.records("from hf")[0]["loss"] < two.records("alone")[0]["loss"] - 0.1


def test_bf16_rounds_as_it_does_with_whole_parameters(two):
    """Although layers are gathered in bf16: bitwise, gradients summed over micro-batches too."""
    for got, expected in zip(two.records("bf16"), two.records("bf16 ddp"), strict=True):
        assert got["loss"] == expected["loss"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-12)
    gradients = two.seen("bf16", 0)["gradients"]
    torch.testing.assert_close(gradients, two.seen("bf16 ddp", 0)["gradients"], rtol=0, atol=0)


def test_in_bf16_islands_stay_wide(two):
    model = make_model(MODEL)
    wide = {
        f"{prefix}.{name}"
        for prefix, module in model.layers.named_modules()
        if isinstance(module, Island)
        for name, _ in module.named_parameters()
    }
    seen = two.seen("bf16", 0)["dtypes"]
    assert {name for name, dtype in seen.items() if dtype == torch.float32} == wide
    assert set(seen.values()) == {torch.float32, torch.bfloat16}
    assert set(two.seen("bf16 ddp", 0)["dtypes"].values()) == {torch.float32}


@pytest.mark.parametrize(("engine", "shape"), RUNS)
def test_an_engine_trains_like_one_process(four, alone, engine, shape):
    name = f"{engine} {shape}"
    steps = four.records(name)
    assert_same(steps, four.records("alone")[: len(steps)], 1e-9)
    gradients = four.seen(name, 0)["gradients"]
    assert gradients.keys() == alone["gradients"].keys()
    for key, expected in alone["gradients"].items():
        torch.testing.assert_close(gradients[key], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("engine", "shape"), RUNS)
def test_a_rank_holds_its_rows(four, alone, engine, shape):
    """Of each parameter as many as the first rank's, filled up; moments of its own rows alone."""
    shards = ENGINES[engine][1]
    for rank in range(4):
        filled = own = 0
        for grad in alone["gradients"].values():
            rows = -(-len(grad) // shards)
            filled += rows * grad[0].nbytes
            own += len(grad[rank % shards * rows :][:rows]) * grad[0].nbytes
        seen = four.seen(f"{engine} {shape}", rank)
        assert seen["bytes"] == {"parameters": filled, "gradients": filled, "optimizer": 2 * own}
        assert seen["memory"] == (own, own, 2 * own)


def test_nothing_else_is_whole(four, alone):
    """Beside its share a rank has tokens, labels and messages, less than a quarter of the model;
    while micro-batches add up too."""
    seen = four.seen("fsdp2 cp1 accumulated", 0)
    for moment in ("alive", "between"):
        assert 0 <= seen[moment] - sum(seen["bytes"].values()) < alone["bytes"]["parameters"] / 4


def test_a_run_in_shards_and_copies_goes_on_in_one_process(four):
    four.alone("alone from hsdp", EXACT, four.resume("hsdp cp2", 2))
    assert_same(four.records("alone from hsdp"), four.records("alone")[2:], 1e-9)


def test_nothing_warns(four):
    for said in four.said.values():
        assert "Warning" not in said


def test_a_single_process_has_nothing_in_shards(tmp_path):
    steps = []
    for engine in ("ddp", "fsdp2"):
        run_dir = tmp_path / engine
        run_dir.mkdir()
        section = config(tmp_path, f"engine={engine}", f"run_dir={run_dir}")
        trainer = build_trainer(section, mesh=SINGLE, run_dir=run_dir)
        steps.append([(s["loss"], s["grad_norm"]) for s in (trainer.train_step() for _ in "12")])
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shard_ranks=3", "engine.shard_ranks is 3; allowed: a divisor of the run's 1 ranks"),
        ("shard_ranks=0", "engine.shard_ranks is 0; allowed: a divisor of the run's 1 ranks"),
        ("cpu_offload=true", "engine.cpu_offload is true; allowed: false, or CUDA under torchrun"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, override, message):
    section = config(tmp_path, "engine=fsdp2", f"engine.{override}")
    with pytest.raises(ConfigError, match=message):
        build_trainer(section, mesh=SINGLE, run_dir=tmp_path)
