"""Every engine trains like one process, holds its share and no more, and goes on from any other.

An engine is tested on four ranks with all degrees of context parallelism by a line in ENGINES.
"""

import json

import pytest
import torch

from models.precision import Island
from parallel.mesh import Mesh
from tests.launch import torchrun
from tests.models.build import compose, make_model
from tests.trainer.engines_on_ranks import watch
from tests.trainer.tiny import config, overrides
from trainer.build import build_trainer
from trainer.checkpoint.convert import convert
from trainer.errors import ConfigError

MODEL = [
    "model.pattern=[kda,kda,mla]",  # with a dense feed-forward, a mixture, a mixture
    "model.num_layers=3",
    "mixer.kda.num_heads=4",
    "mixer.mla.num_heads=4",
]
RUN = [*MODEL, "data.seq_len=48", "data.batch_size=12", "trainer.steps=5", "checkpoint.every=2"]
EXACT = "trainer.precision=fp64"
CHECKPOINTING = "trainer.activation_checkpointing=true"
CUT = "parallel.layout=zigzag"
SHAPES = {  # of four ranks: a step is one micro-batch, or three to six accumulated
    "cp1": ["trainer.micro_batch_size=3"],
    "cp1 accumulated": ["trainer.micro_batch_size=1", CHECKPOINTING],
    "cp2": ["parallel=ring", CUT, "parallel.cp=2", "trainer.micro_batch_size=6"],
    "cp2 accumulated": ["parallel=ulysses", "parallel.cp=2", CHECKPOINTING],
    "cp4": ["parallel=usp", CUT, "parallel.cp=4", "trainer.micro_batch_size=12"],
    "cp4 accumulated": ["parallel=gather", "parallel.cp=4", "trainer.micro_batch_size=3"],
}
HSDP = ["engine=fsdp2", "engine.shard_ranks=2", "engine.reshard_after_forward=false"]
ENGINES = {  # name -> overrides, how many of four ranks hold a copy of the model, and shapes
    "fsdp2": (["engine=fsdp2"], 4, SHAPES),
    "hsdp": (HSDP, 2, ["cp1 accumulated", "cp2"]),
    "hsdp lean": ([*HSDP, "engine.reduce_every_micro_batch=true"], 2, ["cp4 accumulated"]),
}
RUNS = [(engine, shape) for engine, (*_, shapes) in ENGINES.items() for shape in shapes]
SINGLE = Mesh(device=torch.device("cpu"))


class Folder:
    """Runs by name, below one folder."""

    def __init__(self, path):
        self.path = path
        (path / "texts").mkdir()
        for i, length in enumerate((700, 333, 160, 159, 97, 41, 40, 23, 7, 3, 161, 55)):
            text = "".join(chr(97 + (j * (i + 3)) % 26) for j in range(length))
            (path / "texts" / f"{i}.txt").write_text(text)

    def command(self, name: str, *more: str) -> list[str]:
        made = [o for o in overrides(self.path) if not o.startswith(("data.path", "run_dir"))]
        place = [f"data.path={self.path / 'texts'}", f"run_dir={self.path / name}"]
        return [*made, *place, *RUN, *more]

    def alone(self, name: str, *more: str) -> dict:
        """In this process; -> what `watch` saw."""
        (self.path / name).mkdir()
        section = compose(self.command(name, *more))
        trainer = build_trainer(section, mesh=SINGLE, run_dir=self.path / name)
        seen = watch(trainer)
        trainer.run()
        return seen

    def on_ranks(self, ranks: int, jobs: dict[str, list[str]]) -> None:
        """All jobs in one launch, whose standard error is errors_<ranks>.txt."""
        commands = [self.command(name, *more) for name, more in jobs.items()]
        (self.path / "jobs.json").write_text(json.dumps(commands))
        script = ["-m", "tests.trainer.engines_on_ranks", str(self.path / "jobs.json")]
        run = torchrun(ranks, *script, seconds=400)
        (self.path / f"errors_{ranks}.txt").write_text(run.stderr)

    def records(self, name: str) -> list[dict]:
        lines = (self.path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def seen(self, name: str, rank: int) -> dict:
        return torch.load(self.path / name / f"seen_{rank}.pt")

    def checkpoint(self, name: str) -> str:
        return f"resume={self.path / name / 'checkpoints' / 'step_00000002'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    return folder.alone("alone", EXACT, "trainer.micro_batch_size=4")


@pytest.fixture(scope="module")
def two(folder, alone) -> Folder:
    """Two ranks: precisions, and starting from one process, two or a Hugging Face folder."""
    convert(source=str(folder.path / "alone"), target=str(folder.path / "hf"), format="hf")
    folder.alone("from hf alone", EXACT, "trainer.steps=1", f"init_from={folder.path / 'hf'}")
    folder.on_ranks(
        2,
        {
            "fp64 2": ["engine=fsdp2", EXACT],
            "fp64 2 again": ["engine=fsdp2", EXACT, folder.checkpoint("fp64 2")],
            "fp64 2 from alone": ["engine=fsdp2", EXACT, folder.checkpoint("alone")],
            "fp32 2": ["engine=fsdp2", CHECKPOINTING],
            "bf16 2": ["engine=fsdp2", "trainer.precision=bf16", CHECKPOINTING],
            "bf16 2 ddp": ["engine=ddp", "trainer.precision=bf16"],
            "from hf": [
                "engine=fsdp2",
                EXACT,
                "trainer.steps=1",
                f"init_from={folder.path / 'hf'}",
            ],
        },
    )
    return folder


@pytest.fixture(scope="module")
def four(two) -> Folder:
    """Four ranks: every engine in every shape, and going on from two ranks."""
    jobs = {
        f"{engine} {shape}": [*ENGINES[engine][0], EXACT, *SHAPES[shape]] for engine, shape in RUNS
    }
    resume = two.checkpoint("fp64 2")
    jobs["4 from 2"] = ["engine=fsdp2", EXACT, *SHAPES["cp2"], resume]
    jobs["ddp 4 from 2"] = ["engine=ddp", EXACT, *SHAPES["cp1"], resume]
    two.on_ranks(4, jobs)
    return two


def assert_same(run: list[dict], other: list[dict], tolerance: float) -> None:
    for got, expected in zip(run, other, strict=True):
        assert got["step"] == expected["step"] and got["tokens"] == expected["tokens"]
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(expected[key], rel=tolerance, abs=0), key


def test_resuming_on_the_same_ranks_is_bitwise(two):
    assert_same(two.records("fp64 2 again"), two.records("fp64 2")[2:], 0)


def test_a_hugging_face_folder_goes_into_the_shards(two):
    assert_same(two.records("from hf"), two.records("from hf alone"), 1e-9)
    assert two.records("from hf")[0]["loss"] < two.records("alone")[0]["loss"] - 0.1


def test_fp32_follows_one_process(two):
    two.alone("fp32 alone", "trainer.micro_batch_size=4")
    assert_same(two.records("fp32 2"), two.records("fp32 alone"), 1e-5)


def test_bf16_rounds_as_it_does_with_whole_parameters(two):
    """Although layers are gathered in bf16: bitwise, gradients summed over micro-batches too."""
    for got, expected in zip(two.records("bf16 2"), two.records("bf16 2 ddp"), strict=True):
        assert got["loss"] == expected["loss"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-12)
    gradients = two.seen("bf16 2", 0)["gradients"]
    torch.testing.assert_close(gradients, two.seen("bf16 2 ddp", 0)["gradients"], rtol=0, atol=0)


def test_in_bf16_islands_stay_wide(two):
    model = make_model(MODEL)
    wide = {
        f"{prefix}.{name}"
        for prefix, module in model.layers.named_modules()
        if isinstance(module, Island)
        for name, _ in module.named_parameters()
    }
    seen = two.seen("bf16 2", 0)["dtypes"]
    assert {name for name, dtype in seen.items() if dtype == torch.float32} == wide
    assert set(seen.values()) == {torch.float32, torch.bfloat16}
    assert set(two.seen("bf16 2 ddp", 0)["dtypes"].values()) == {torch.float32}


@pytest.mark.parametrize(("engine", "shape"), RUNS)
def test_an_engine_trains_like_one_process(four, alone, engine, shape):
    name = f"{engine} {shape}"
    assert_same(four.records(name), four.records("alone"), 1e-9)
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
    """Beside its share a rank has tokens, labels and messages, less than a quarter of the model."""
    seen = four.seen("fsdp2 cp1", 0)  # the first job of its processes
    assert 0 <= seen["alive"] - sum(seen["bytes"].values()) < alone["bytes"]["parameters"] / 4


@pytest.mark.parametrize("ranks", ["fp64 2 from alone", "4 from 2", "ddp 4 from 2"])
def test_a_run_goes_on_with_another_engine_and_other_ranks(four, ranks):
    assert_same(four.records(ranks), four.records("alone")[2:], 1e-9)


def test_a_run_goes_on_in_one_process(four):
    four.alone("alone from 4", EXACT, four.checkpoint("hsdp cp2"))
    assert_same(four.records("alone from 4"), four.records("alone")[2:], 1e-9)


def test_nothing_warns(four):
    for ranks in (2, 4):
        assert "Warning" not in (four.path / f"errors_{ranks}.txt").read_text()


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
