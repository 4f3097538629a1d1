"""What Accelerate is configured to do, on its real DDP, FSDP2 and DeepSpeed back ends."""

import re

import pytest

from tests import launch
from tests.trainer.runs import SINGLE, Runs, assert_same, assert_same_gradients
from tests.trainer.tiny import config
from trainer.build import build_trainer
from trainer.errors import ConfigError

RUN = [
    "model.pattern=[kda,mla]",
    "model.num_layers=2",
    "mixer.kda.num_heads=4",
    "mixer.mla.num_heads=4",
    "data.seq_len=48",
    "data.batch_size=8",
    "trainer.steps=3",
]
ENGINE = "engine=accelerate"
FSDP = ["ACCELERATE_USE_FSDP=true", "FSDP_VERSION=2"]
BACK_ENDS = {"ddp": [], "fsdp2": FSDP} | {  # name -> environment
    f"zero{stage}": ["ACCELERATE_USE_DEEPSPEED=true", f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}"]
    for stage in (1, 2, 3)
}
SHAPES = {  # of two ranks: a step is two micro-batches, or one
    "cp1": ["trainer.micro_batch_size=2", "trainer.activation_checkpointing=true"],
    "cp2": ["parallel=ring", "parallel.layout=zigzag", "trainer.micro_batch_size=8"],
}
RUNS = [*((name, "cp2") for name in BACK_ENDS), ("ddp", "cp1"), ("fsdp2", "cp1"), ("zero2", "cp1")]
RESUMED = {"zero3": "fsdp2", "ddp": "zero3", "fsdp2": "ddp"}  # back end -> whose checkpoint
REFUSED = {  # what Accelerate made of its environment -> that environment
    "dynamo_backend=INDUCTOR; allowed: NO": ["ACCELERATE_DYNAMO_BACKEND=inductor"],
    "fsdp_version=1; allowed: 2": ["ACCELERATE_USE_FSDP=true"],
    "zero_stage=0; allowed: 1, 2 or 3": [
        "ACCELERATE_USE_DEEPSPEED=true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE=0",
    ],
    "cp_size x sp_size=2; allowed: 1": [
        *FSDP,
        "ACCELERATE_USE_PARALLELISM_CONFIG=true",
        "PARALLELISM_CONFIG_CP_SIZE=2",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("accelerate"), RUN)


@pytest.fixture(scope="module")
def alone(runs) -> dict:
    return runs.alone("alone", "trainer.micro_batch_size=8")


@pytest.fixture(scope="module")
def said(runs, alone) -> str:
    """By two ranks: every back end, going on from others, and what is refused."""
    jobs = {}
    for name, shape in RUNS:
        more = ["unsaved", "trainer.steps=1"] if shape == "cp1" else ["checkpoint.every=2"]
        jobs[f"{name} {shape}"] = [ENGINE, *BACK_ENDS[name], *SHAPES[shape], *more]
    for name, other in RESUMED.items():
        resume = runs.resume(f"{other} cp2", 2)
        jobs[f"{name} from {other}"] = [ENGINE, *BACK_ENDS[name], *SHAPES["cp2"], "unsaved", resume]
    for i, environment in enumerate(REFUSED.values()):
        jobs[f"refused {i}"] = [ENGINE, *environment]
    return runs.on_ranks(2, jobs)


@pytest.fixture(scope="module")
def four(runs, alone) -> Runs:
    """Four ranks that share sequences, two of which hold a copy each."""
    sizes = [f"PARALLELISM_CONFIG_DP_{kind}_SIZE=2" for kind in ("REPLICATE", "SHARD")]
    copies = [*FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG=true", *sizes]
    usp = ["parallel=usp", "trainer.micro_batch_size=4", "trainer.steps=1", "unsaved"]
    runs.on_ranks(4, {"fsdp2 in copies": [ENGINE, *copies, *usp]})
    return runs


def test_shards_and_copies_train_like_one_process(four, alone):
    assert_same(four.records("fsdp2 in copies"), four.records("alone")[:1], 1e-5)
    seen = four.seen("fsdp2 in copies", 3)
    assert_same_gradients(seen["gradients"], alone["gradients"], 1e-5)
    rows = sum(-(-len(grad) // 2) * grad[0].nbytes for grad in alone["gradients"].values())
    assert seen["bytes"]["parameters"] == rows


@pytest.mark.parametrize(("name", "shape"), RUNS)
def test_a_back_end_trains_like_one_process(said, runs, alone, name, shape):
    steps = runs.records(f"{name} {shape}")
    assert len(steps) == {"cp1": 1, "cp2": 3}[shape]
    assert_same(steps, runs.records("alone")[: len(steps)], 1e-5)
    gradients = runs.seen(f"{name} {shape}", 0)["gradients"]
    assert_same_gradients(gradients, alone["gradients"], 1e-5)


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_holds_its_share(said, runs, alone, rank):
    """Of fully sharded parameters their rows, as many as the first rank's, filled up."""
    whole = sum(grad.nbytes for grad in alone["gradients"].values())
    seen = {name: runs.seen(f"{name} cp2", rank)["bytes"] for name in BACK_ENDS}
    assert seen["ddp"] == {"parameters": whole, "gradients": whole, "optimizer": 2 * whole}
    rows = sum(-(-len(grad) // 2) * grad[0].nbytes for grad in alone["gradients"].values())
    assert seen["fsdp2"]["parameters"] == seen["fsdp2"]["gradients"] == rows
    for name in ("zero1", "zero2"):
        assert seen[name]["parameters"] == pytest.approx(whole, rel=1e-3)
        assert seen[name]["optimizer"] == pytest.approx(3 * whole / 2, rel=1e-3)
    assert seen["zero3"]["parameters"] == pytest.approx(whole / 2, rel=2e-3)
    assert seen["zero3"]["optimizer"] == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_back_end(said, runs, name):
    assert_same(runs.records(f"{name} from {RESUMED[name]}"), runs.records("alone")[2:], 1e-5)


def test_a_run_goes_on_without_accelerate(said, runs):
    runs.alone("alone from fsdp2", "trainer.micro_batch_size=8", runs.resume("fsdp2 cp2", 2))
    assert_same(runs.records("alone from fsdp2"), runs.records("alone")[2:], 1e-5)


@pytest.mark.parametrize("line", REFUSED)
def test_what_it_made_of_its_environment_is_checked(said, line):
    assert said.count(f"refused: engine=accelerate: {line}\n") == 2


def test_its_launcher(runs, alone):
    """On a machine without a GPU, where Accelerate by itself would take each rank for a single
    process."""
    more = ["parallel=ring", "parallel.layout=zigzag", "trainer.micro_batch_size=4"]
    words = runs.words("launched", ENGINE, *more, "trainer.steps=1")
    command = ["accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2", "--num_processes=2"]
    command += ["--use_parallelism_config", "--parallelism_config_dp_shard_size=2"]
    command += ["scripts/train.py", *words]
    run = launch.alone("tests.launchers", *command, environment={"OMP_NUM_THREADS": "1"})
    assert (runs.path / "launched" / "checkpoints" / "step_00000001").is_dir(), run.stderr
    assert "mesh    2 x cpu = 1 data x 2 ring x 1 ulysses, gloo, fp32" in run.stdout
    assert_same(runs.records("launched"), runs.records("alone")[:1], 1e-5)


@pytest.mark.parametrize(
    ("variables", "choices", "line"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "trainer.precision=fp32: accelerate is confi"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["trainer.precision=bf16"], "trainer.precision=b"),
        (
            {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"},
            [],
            "ACCELERATE_USE_CPU=true: drops FSDP; allowed: false",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            [],
            "FSDP_ACTIVATION_CHECKPOINTING=true: is trainer.activation_checkpointing here; allowed",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            ["trainer.precision=fp64"],
            "trainer.precision=fp64: DeepSpeed has none; allowed: fp32, bf16",
        ),
    ],
)
def test_what_is_ours_to_do_is_refused(tmp_path, monkeypatch, variables, choices, line):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(line)):
        build_trainer(config(tmp_path, ENGINE, *choices), mesh=SINGLE, run_dir=tmp_path)
