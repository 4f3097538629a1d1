"""Training with a teacher: every engine and every scheme gives the numbers of one process."""

import pytest
import tokenizers
import torch

from tests.models.build import compose
from tests.trainer.runs import SINGLE, Runs, assert_same, assert_same_gradients
from trainer.build import build_trainer
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import open_weights
from trainer.errors import ConfigError

RUN = [
    "model.moe=null",
    "mixer.kda.num_heads=4",
    "mixer.gqa.num_heads=4",
    "mixer.gqa.num_kv_heads=2",
    "mixer.gqa.head_dim=4",
    "model.num_layers=2",
    "data.seq_len=64",
    "data.batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.steps=2",
    "trainer.precision=fp64",
    "checkpoint.every=0",
]
STUDENT = ["model.pattern=[kda,gqa]"]
TEACHER = ["model.pattern=[gqa]"]
OBJECTIVES = {"kd": ["objective=kd", "objective.ce_weight=0.2"], "ild": ["objective=ild"]}
CUT = "parallel.layout=zigzag"
CHECKPOINTING = "trainer.activation_checkpointing=true"
FP32, BF16 = "trainer.precision=fp32", "trainer.precision=bf16"
ONE_STEP = "trainer.steps=1"
WHOLE = "objective.shard_teacher=false"
ZERO3 = ["engine=zero3", "engine.whole_below=0"]
SHARED = "trainer.micro_batch_size=4"
FOUR = {  # jobs of four ranks
    "kd fsdp2": ["engine=fsdp2", "parallel=usp", CUT, "trainer.micro_batch_size=8", WHOLE],
    "ild ddp": ["parallel=ring", CUT, "parallel.cp=2", SHARED, CHECKPOINTING],
}
TWO = {  # of two
    "kd accelerate": ["engine=accelerate", "parallel=gather", SHARED],
    "ild fsdp2": ["engine=fsdp2", "parallel=gather", CUT, SHARED, CHECKPOINTING],
    "ild zero2": ["engine=zero2", FP32],
    "ild zero3": [*ZERO3, "parallel=ulysses", SHARED, FP32],
    "kd bf16": ["engine=fsdp2", BF16, ONE_STEP, SHARED],
    "kd bf16 whole": ["engine=fsdp2", BF16, ONE_STEP, SHARED, WHOLE],
}
JOBS = FOUR | TWO
SAVED = {"ild zero2": [], "ild zero3": ["checkpoint.every=1"]}
EXACT = [name for name, more in JOBS.items() if BF16 not in more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """With teachers: a narrow one of the other mixer, and one of the student's shape."""
    runs = Runs(tmp_path_factory.mktemp("objectives"), RUN)
    runs.alone("teacher of kd", *TEACHER, "model.d_model=12", "trainer.seed=5")
    runs.alone("teacher of ild", *TEACHER, "trainer.seed=5")
    return runs


def words(runs: Runs, objective: str, *more: str) -> list[str]:
    teacher = f"objective.teacher='{runs.path / f'teacher of {objective}'}'"
    return [*STUDENT, *OBJECTIVES[objective], teacher, *more]


@pytest.fixture(scope="module")
def alone(runs) -> dict[str, dict]:
    return {
        objective: runs.alone(f"{objective} alone", *words(runs, objective, "checkpoint.every=1"))
        for objective in OBJECTIVES
    }


@pytest.fixture(scope="module")
def shared(runs, alone) -> Runs:
    """With all jobs done by ranks."""
    jobs = {
        name: [*SAVED.get(name, ["unsaved"]), *words(runs, name.split()[0], *more)]
        for name, more in JOBS.items()
    }
    four = {name: jobs.pop(name) for name in FOUR}
    jobs["ild zero3 again"] = [
        *words(runs, "ild", *JOBS["ild zero3"], runs.resume("ild zero3", 1)),
        "unsaved",
    ]
    runs.said = runs.on_ranks(2, jobs) + runs.on_ranks(4, four)
    return runs


@pytest.mark.parametrize("name", EXACT)
def test_an_engine_learns_like_one_process(shared, alone, name):
    objective = name.split()[0]
    tolerance = 2e-5 if FP32 in JOBS[name] else 1e-9
    got, expected = shared.records(name), shared.records(f"{objective} alone")
    assert_same(got, expected, tolerance)
    parts = ("kl", "cross_entropy") if objective == "kd" else ("layer_00", "mixer_01")
    for mine, other in zip(got, expected, strict=True):
        assert [mine[key] for key in parts] == pytest.approx(
            [other[key] for key in parts], tolerance
        )
    assert_same_gradients(
        shared.seen(name, 0)["gradients"], alone[objective]["gradients"], 10 * tolerance
    )


def test_in_bf16_a_teacher_in_shards_says_the_same(shared):
    """Bitwise: its products are rounded alike wherever its weights are."""
    (shards,), (whole,) = shared.records("kd bf16"), shared.records("kd bf16 whole")
    assert (shards["loss"], shards["grad_norm"]) == (whole["loss"], whole["grad_norm"])


@pytest.mark.parametrize("name", ["ild zero2", "ild zero3"])
def test_what_is_frozen_is_saved_and_read_too(shared, alone, name):
    got, expected = weights(shared, name, 2), weights(shared, "ild alone", 2)
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        torch.testing.assert_close(got[key].double(), x, rtol=1e-4, atol=1e-4)
    assert shared.records("ild zero3 again")[0]["loss"] == shared.records("ild zero3")[1]["loss"]


def test_nothing_warns(shared):
    assert "Warning" not in shared.said


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_the_uninterrupted_one(runs, alone, objective):
    name = f"{objective} alone"
    runs.alone(f"{name} again", *words(runs, objective, runs.resume(name, 1)))
    (got,), (_, expected) = runs.records(f"{name} again"), runs.records(name)
    for key in ("loss", "grad_norm"):
        assert got[key] == expected[key]


def test_layers_alone_train(runs, alone):
    start, end = (weights(runs, "ild alone", step) for step in (1, 2))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if name.startswith("layers.")}


def weights(runs: Runs, name: str, step: int) -> dict[str, torch.Tensor]:
    source = open_weights(runs.path / name / "checkpoints" / f"step_{step:08}")
    return {key: source.get(key) for key in source.shapes}


def test_what_is_frozen_has_no_gradients_and_moments(alone, shared):
    for seen, ranks in ((alone["ild"], 1), (shared.seen("ild fsdp2", 0), 2)):
        parameters, gradients, moments = seen["memory"]
        layers = sum(x.nbytes for x in seen["gradients"].values())
        assert 0.9 * layers <= ranks * gradients <= 1.1 * layers
        assert moments == 2 * gradients and parameters > gradients
    assert alone["ild"]["memory"][1] == sum(x.nbytes for x in alone["ild"]["gradients"].values())


@pytest.mark.parametrize(
    ("objective", "key", "value", "line"),
    [
        ("kd", "objective.temperature", 0, r"^objective\.temperature is 0; allowed: above 0$"),
        ("kd", "objective.ce_weight", 2, r"^objective\.ce_weight is 2; allowed: 0 to 1$"),
        ("kd", "model.vocab_size", 384, r"^objective\.teacher=.*: it has 320 words, the model 384"),
        ("kd", "objective.teacher", "x", r"^objective\.teacher=x: no weights in x;"),
        ("ild", "model.num_layers", 3, r": it has 2 layers, the model 3; allowed: as many$"),
        ("ild", "model.d_model", 8, r": it has 16 channels, the model 8; allowed: as many$"),
        ("ild", "model.residual_block", 2, r": the model has model\.residual_block, where layers"),
        ("ild", "trainer.compile", True, r"^trainer\.compile=true: objective=ild watches the mix"),
        ("ild", "objective.norm", "l1", r"^objective\.norm=l1: allowed: mse, l2$"),
    ],
)
def test_bad_input_is_one_line(runs, objective, key, value, line):
    config = compose(runs.words("bad", *words(runs, objective)))
    section, _, name = key.partition(".")
    config[section][name] = value
    with pytest.raises(ConfigError, match=line) as error:
        build_trainer(config, mesh=SINGLE, run_dir=runs.path)
    assert "\n" not in str(error.value)


def test_words_of_the_teacher_must_be_those_of_the_data(runs, tmp_path):
    """As many, but other ones."""
    folder = tmp_path / "teacher"
    convert(source=str(runs.path / "teacher of kd"), target=str(folder), format="native")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    config = compose(runs.words("bad", *words(runs, "kd")))
    config["objective"]["teacher"] = str(folder)
    with pytest.raises(ConfigError, match=r"its tokenizer has other words than data\.tokenizer"):
        build_trainer(config, mesh=SINGLE, run_dir=runs.path)


@pytest.mark.parametrize(
    ("stage", "objective", "tokens"),
    [("ild", "ild", 2048), ("kd", "kd", 2048), ("long", "kd", 32768)],
)
def test_stages_of_a_recipe(stage, objective, tokens):
    teacher = "objective.teacher=x"
    config = compose([f"experiment=zebra_llama_{stage}", teacher, "init_from=y", "optim.lr=1"])
    assert config["model"] == "init_from" and config["optim"]["lr"] == 1
    assert config["objective"] == compose([f"objective={objective}", teacher])["objective"]
    assert config["data"]["seq_len"] == tokens
