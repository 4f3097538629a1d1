"""ZeRO-1, -2 and -3 train like one process and hold their shares.

test_resume_matrix.py takes more steps, and goes on from any engine.
"""

import functools
import re
from itertools import accumulate

import pytest
from torch.distributed.checkpoint import FileSystemReader

from tests import launch
from tests.models.build import make_model
from tests.trainer.runs import SINGLE, Runs, assert_same, assert_same_gradients
from tests.trainer.tiny import MODEL as TINY
from tests.trainer.tiny import config
from trainer.build import build_trainer
from trainer.checkpoint.convert import convert
from trainer.errors import ConfigError
from trainer.optim import decay_groups

MODEL = [
    "model.pattern=[kda,mla]",  # with a dense feed-forward, then a mixture
    "model.num_layers=2",
    "mixer.kda.num_heads=4",
    "mixer.mla.num_heads=4",
]
RUN = [
    *MODEL,
    "data.seq_len=48",
    "data.batch_size=8",
    "checkpoint.keep=0",
    "engine.bucket_mb=0.01",
]
CHECKPOINTING = "trainer.activation_checkpointing=true"
CUT = "parallel.layout=zigzag"
SHAPES = {  # of four ranks: a step is one micro-batch, or two accumulated
    "cp1": ["trainer.micro_batch_size=2"],
    "cp2 accumulated": ["parallel=ring", CUT, "parallel.cp=2", "trainer.micro_batch_size=2"],
    "cp4": ["parallel=gather", "parallel.cp=4", "trainer.micro_batch_size=8"],
    "cp4 accumulated": ["parallel=usp", CUT, "parallel.cp=4", "trainer.micro_batch_size=4"],
}
# With those of two ranks every stage with accumulation and without; test_engine_matrix.py has all.
RUNS = [(1, "cp4"), (2, "cp1"), (2, "cp2 accumulated"), (3, "cp4 accumulated")]
STAGES = {
    1: ["engine=zero1"],
    2: ["engine=zero2"],
    3: ["engine=zero3", "engine.whole_below=0", "engine.live_elements=0"],
}
MIXERS = [  # and what parameters are used for outside the forward of their own module
    "model.pattern=[gqa,kda,mla,nats_l]",
    "model.num_layers=4",
    "model.tie_embeddings=true",
    "model.residual_block=2",
    "mixer.gqa.num_heads=2",
    "mixer.gqa.num_kv_heads=1",
    "mixer.gqa.head_dim=8",
    "mixer.gqa.qk_norm=true",
    "mixer.mla.q_rank=6",
    "trainer.steps=2",
    "trainer.micro_batch_size=2",
]
STEPS = ["trainer.steps=3", "schedule.total_steps=6", "trainer.micro_batch_size=2"]
START = ["trainer.steps=1", "trainer.micro_batch_size=4"]
TWICE = ["trainer.steps=2", "trainer.micro_batch_size=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("zero"), RUN)


@pytest.fixture(scope="module")
def alone(runs) -> dict:
    more = ["trainer.steps=6", "engine.bucket_mb=25", "trainer.micro_batch_size=8"]
    return runs.alone("alone", *STEPS, *more)


@pytest.fixture(scope="module")
def two(runs, alone) -> Runs:
    """Two ranks: three steps of every kind, and starting from a Hugging Face folder."""
    convert(source=str(runs.path / "alone"), target=str(runs.path / "hf"), format="hf")
    folder = f"init_from={runs.path / 'hf'}"
    runs.alone("from hf alone", *START, folder)
    runs.alone("mixers alone", *MIXERS)
    mixed = ["unsaved", "trainer.precision=bf16", *TWICE, CHECKPOINTING]
    dropped = ["unsaved", "dropped", *STEPS]
    offload = [*dropped, "engine.offload_optimizer=cpu"]
    jobs = {f"zero{stage}": ["counted", *STAGES[stage], *STEPS] for stage in STAGES}
    jobs["zero2"] += ["checkpoint.every=2"]
    jobs |= {
        "zero2 again": ["unsaved", *STAGES[2], *STEPS, runs.resume("zero2", 2)],
        "zero3 from hf": ["unsaved", *STAGES[3], *START, folder],
        "zero3 mixers": ["unsaved", *STAGES[3], *MIXERS, CHECKPOINTING],
        "zero2 dropped": [*STAGES[2], *dropped],
        "zero3 dropped": [*STAGES[3], *dropped],
        "zero2 offloaded": [*STAGES[2], *offload],
        "zero3 offloaded": [*STAGES[3], *offload, "engine.offload_parameters=cpu"],
        "zero3 bf16": ["engine=zero3", *mixed],
        "ddp bf16": ["engine=ddp", *mixed],
        "compiled": ["engine=zero3", "trainer.compile=true"],
    }
    runs.said = {2: runs.on_ranks(2, jobs)}
    return runs


@pytest.fixture(scope="module")
def four(two) -> Runs:
    """Four ranks."""
    jobs = {
        f"zero{stage} {shape}": ["unsaved", *STAGES[stage], *SHAPES[shape], "trainer.steps=1"]
        for stage, shape in RUNS
    }
    two.said[4] = two.on_ranks(4, jobs)
    return two


@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_those_of_one_process(two, stage):
    assert_same(two.records(f"zero{stage}"), two.records("alone")[:3], 1e-4)


@pytest.mark.parametrize(("stage", "shape"), RUNS)
def test_a_step_is_that_of_one_process(four, alone, stage, shape):
    name = f"zero{stage} {shape}"
    assert_same(four.records(name), four.records("alone")[:1], 1e-5)
    assert_same_gradients(four.seen(name, 0)["gradients"], alone["gradients"], 1e-5)


@functools.cache
def group_sizes() -> list[list[int]]:
    return [[p.numel() for p in group] for group in decay_groups(make_model([*TINY, *MODEL]))]


def partition_bytes(stage: int, rank: int, ranks: int) -> dict[str, int]:
    """What a rank holds while it waits for the update.

    Stage 3 cuts each parameter. The others lay out a group of parameters behind each other and cut
    that; each rank has a copy of its part, for the update, and gradients of whole parameters.
    """
    groups = group_sizes()
    if stage == 3:
        own = 4 * sum(-(-size // ranks) for group in groups for size in group)
        return {"parameters": own, "gradients": own, "optimizer": 2 * own}
    whole = gradients = part = 0
    for group in groups:
        own = -(-sum(group) // (2 * ranks)) * 2
        starts = accumulate([0, *group])
        touched = [
            size
            for size, start in zip(group, starts, strict=False)
            if start < (rank + 1) * own and start + size > rank * own
        ]
        whole += ranks * own
        part += own
        gradients += sum(touched)
    return {"parameters": 4 * whole, "gradients": 4 * gradients, "optimizer": 3 * 4 * part}


@pytest.mark.parametrize(("stage", "shape"), RUNS)
def test_a_rank_holds_its_share(four, stage, shape):
    for rank in range(4):
        assert four.seen(f"zero{stage} {shape}", rank)["bytes"] == partition_bytes(stage, rank, 4)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_else_is_whole(two, stage):
    """Beside its share a rank has tokens, labels and messages, less than the model."""
    for rank in range(2):
        seen = two.seen(f"zero{stage}", rank)
        model = sum(grad.nbytes for grad in seen["gradients"].values())
        assert 0 <= seen["alive"] - sum(seen["bytes"].values()) < model


def test_resuming_is_bitwise(two):
    assert_same(two.records("zero2 again"), two.records("zero2")[2:], 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_has_the_same_tensors(two, stage):
    """Names, shapes and dtypes as those of one process."""
    states = []
    for name, step in ((f"zero{stage}", 3), ("alone", 6)):
        path = two.path / name / "checkpoints" / f"step_{step:08}"
        states.append(FileSystemReader(path).read_metadata().state_dict_metadata)
    assert states[0].keys() == states[1].keys()
    for name, entry in states[0].items():
        assert (entry.size, entry.properties.dtype) == (
            states[1][name].size,
            states[1][name].properties.dtype,
        ), name


def test_a_hugging_face_folder_goes_into_the_shards(two):
    assert_same(two.records("zero3 from hf"), two.records("from hf alone"), 1e-5)
    assert two.records("zero3 from hf")[0]["loss"] < two.records("alone")[0]["loss"] - 0.1


def test_every_mixer_finds_its_parameters(two):
    assert_same(two.records("zero3 mixers"), two.records("mixers alone"), 1e-5)


@pytest.mark.parametrize("name", ["zero2 dropped", "zero3 dropped"])
def test_a_dropped_step_leaves_no_trace(two, name):
    assert_same(two.records(name), two.records(name.split()[0]), 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_on_the_host_trains_the_same(two, stage):
    """Also after a dropped step. Gradients are whole parameters' no more, as they are copied."""
    assert_same(two.records(f"zero{stage} offloaded"), two.records(f"zero{stage}"), 1e-6)
    share = partition_bytes(3, 0, 2)["gradients"]
    seen = two.seen(f"zero{stage} offloaded", 0)["bytes"]
    assert seen["gradients"] <= share * 1.01 and seen["optimizer"] >= 3 * share


def test_bf16_rounds_as_it_does_with_whole_parameters(two):
    """Products in bf16 over fp32 parameters; gradients reduced in fp32."""
    got, expected = two.records("zero3 bf16"), two.records("ddp bf16")
    assert got[0]["loss"] == expected[0]["loss"] != two.records("alone")[0]["loss"]
    assert got[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-6)
    gradients = two.seen("ddp bf16", 0)["gradients"]
    assert_same_gradients(two.seen("zero3 bf16", 0)["gradients"], gradients, 1e-6)


def test_nothing_else_is_said(four):
    """By DeepSpeed, which talks and warns on standard output."""
    for said in four.said.values():
        assert not re.search("deepspeed|warning", said, re.IGNORECASE)


def test_what_stage_3_fetches_is_not_compiled(two):
    assert two.said[2].count("refused: trainer.compile=true: parameters that ranks fetch") == 2


def test_a_single_process_needs_no_launcher(runs, alone):
    """And leaves nothing but its run_dir."""
    (runs.path / "home").mkdir()
    path = runs.path / "single"
    words = runs.words("single", *STAGES[3], "trainer.steps=1", "engine.offload_optimizer=cpu")
    command = ("tests.script", "scripts/train.py", *words)
    run = launch.alone(*command, environment={"HOME": str(runs.path / "home")})
    assert (path / "checkpoints" / "step_00000001").is_dir(), run.stderr
    assert_same(runs.records("single"), runs.records("alone")[:1], 1e-5)
    assert list((runs.path / "home").iterdir()) == []


@pytest.mark.parametrize(
    ("choices", "line"),
    [
        (["engine=zero2", "trainer.precision=fp64"], "engine=zero2: DeepSpeed has no fp64; allo"),
        (["engine=zero3", "engine.offload_optimizer=nvme"], "engine.offload_optimizer=nvme: allow"),
        (["engine=zero1", "+engine.offload_parameters=cpu"], "engine.offload_parameters is cpu; "),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, choices, line):
    with pytest.raises(ConfigError, match=re.escape(line)):
        build_trainer(config(tmp_path, *choices), mesh=SINGLE, run_dir=tmp_path)
