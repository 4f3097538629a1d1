"""The command line: exit codes, the one line of an error, the files of a run."""

import json
import os
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from omegaconf import OmegaConf

from tests.models.build import compose
from tests.trainer.tiny import QUICK, overrides
from trainer import main
from trainer.checkpoint.convert import convert
from trainer.console import close_logging


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Runs a command line in this process; -> exit code, standard output, lines of errors."""
    monkeypatch.chdir(tmp_path)
    # Gone again afterwards: other tests call Hydra too.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def train(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.command("train", main.train)
        out, err = capfd.readouterr()
        return stop.value.code, out, err.splitlines()

    yield train
    close_logging()


def test_a_run_from_start_to_end(train, tmp_path):
    arguments = overrides(tmp_path, *QUICK, "logging.every=2", "eval.every=4")
    code, out, errors = train(*arguments)
    assert (code, errors) == (0, [])
    folder = tmp_path / "run"
    status = json.loads((folder / "status.json").read_text())
    assert (status["outcome"], status["step"], status["pid"]) == ("done", 4, os.getpid())
    assert yaml.safe_load((folder / "config.yaml").read_text())["schedule"]["total_steps"] == 4
    shown = out.splitlines()
    assert [line[:8] for line in shown if line.startswith("step ")] == ["step 2/4", "step 4/4"]
    assert "eval_loss" in out and "mesh" in out and "parameters" in out
    assert shown[-1] == f"saved {folder / 'checkpoints' / 'step_00000004'}"
    logged = [line.split(" ", 2)[2] for line in (folder / "train.log").read_text().splitlines()]
    assert logged == shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "documents", "run"]
    for steps in (4, 3):
        code, out, errors = train(*arguments, f"trainer.steps={steps}")
        assert (code, errors) == (0, []) and f"nothing to do: trainer.steps={steps} is reach" in out


def test_a_run_takes_its_model_from_a_folder_and_goes_on(train, tmp_path):
    own = ["model.pattern=[mla,gqa]", "mixer.gqa.head_dim=8", "mixer.mla.rope_base=100"]
    assert train(*overrides(tmp_path, *QUICK, *own, "trainer.steps=2"))[0] == 0
    first = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    folder = tmp_path / "native"
    convert(source=str(tmp_path / "run"), target=str(folder), format="native")
    plain = [o for o in overrides(tmp_path) if not o.startswith(("model.", "mixer."))]
    more = ["model=init_from", f"init_from={folder}", f"run_dir={tmp_path / 'second'}"]
    for steps in (1, 2):  # and resumed
        code, out, errors = train(*plain, *more, f"trainer.steps={steps}")
        assert (code, errors) == (0, [])
    assert "resumed from" in out and "weights from" not in out
    second = yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())
    assert second["model"] == first["model"] | {"vocab_size": 320}
    assert second["mixer"] == {name: first["mixer"][name] for name in ("mla", "gqa")}
    records = (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[0])["loss"] < 5.7  # less than an even guess among 320


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["init_from=null"], "init_from=null: model=init_from needs a folder with weights"),
        (["init_from=nowhere"], "init_from=nowhere: no weights in nowhere; allowed: "),
        (["mixer.kda.num_heads=2"], "mixer.kda.num_heads=2: model=init_from takes both sections"),
        (["model.d_model=8"], "model.d_model=8: model=init_from takes both sections as they are"),
    ],
)
def test_a_model_that_cannot_be_taken_is_one_line(train, arguments, line):
    code, _, errors = train("model=init_from", *arguments)
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {line}")


@pytest.mark.parametrize(
    "word", ["mixer.gqa.window=16", "model.tie_embeddings=false", "+model.window=16", "mixer={}"]
)
def test_nor_is_it_changed_where_an_experiment_takes_it(train, word):
    code, _, errors = train("experiment=zebra_llama_ild", "objective.teacher=x", word)
    assert (code, errors) == (2, [f"error: {word}: {main.TAKEN}"])


def test_keys_that_are_named_are_those_of_what_was_chosen(train):
    code, _, errors = train("objective=kd", "objective.teacher=x", "objective.ce=1")
    assert code == 2
    assert errors[0].startswith("error: objective.ce=1: unknown key; allowed: objective.teacher, ")


def test_wandb_keeps_its_run_over_resumptions(train, tmp_path):
    folder = tmp_path / "run"
    for steps in (1, 2):
        more = ["logging.wandb=offline", f"trainer.steps={steps}", "schedule.total_steps=2"]
        assert train(*overrides(tmp_path, *QUICK, *more))[0] == 0
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert {path.name.rsplit("-", 1)[1] for path in runs} == {(folder / "wandb_id").read_text()}


def test_wandb_without_a_key_is_told_before_anything_is_built(train, tmp_path, monkeypatch):
    def login(verify: bool) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", login)
    code, out, errors = train(*overrides(tmp_path, *QUICK, "logging.wandb=online"))
    assert (code, out) == (2, "") and len(errors) == 1
    assert errors[0].startswith("error: logging.wandb=online: No API key configured; allowed: off")


@pytest.mark.parametrize("run_dir", [[], ["run_dir=runs/sweep"]])
def test_a_sweep_gives_each_job_a_folder(train, tmp_path, run_dir):
    words = overrides(tmp_path, *QUICK, "trainer.steps=1")
    arguments = [word for word in words if "run_dir" not in word]
    arguments += run_dir
    assert train("--multirun", *arguments, "optim.lr=1e-3,1e-2")[::2] == (0, [])
    folders = sorted(path.parent for path in (tmp_path / "runs").rglob("status.json"))
    rates = [yaml.safe_load((path / "config.yaml").read_text())["optim"]["lr"] for path in folders]
    assert rates == [1e-3, 1e-2]
    if run_dir:
        code, out, _ = train(*arguments, "--multirun", "optim.lr=1e-3,1e-2")
        assert code == 0 and out.count("nothing to do") == 2


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("foo=1", "foo=1: unknown key; allowed: mixer, data, "),
        ("trainer.stepz=1", "trainer.stepz=1: unknown key; allowed: trainer.steps, "),
        ("mixer.kda.heads=1", "mixer.kda.heads=1: unknown key; allowed: mixer.kda.num_heads, "),
        ("model=none", "model=none: unknown choice; allowed: gdn_hybrid, "),
        ("engine=none", "engine=none: unknown choice; allowed: accelerate, ddp"),
        ("engine=null", "engine=null: unknown choice; allowed: accelerate, ddp"),
        ("schedule=[]", "schedule=[]: unknown choice; allowed: constant, cosine, wsd"),
        ("tasks.kv.depth=1", "tasks.kv.depth=1: unknown key; allowed: tasks.kv.lengths, "),
        ("trainer.steps=[1", "'trainer.steps=[1': not understood"),
        ("trainer.steps=0", "trainer.steps is 0; allowed: 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(train, tmp_path, argument, line):
    code, _, errors = train(*overrides(tmp_path), *argument.split())
    assert code == 2
    assert len(errors) == 1 and errors[0].startswith(f"error: {line}"), errors


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("+trainer.stepz=1", "trainer.stepz=1: unknown key; allowed: activation_checkpointing, "),
        ("trainer.steps=many", "trainer.steps=many: allowed: int"),
        ("trainer.steps=0", "trainer.steps is 0; allowed: 1 or more"),
        ("trainer.seed=9223372036854775808", "trainer.seed=9223372036854775808: allowed: int"),
        ("trainer.grad_clip=nan", "trainer.grad_clip=nan: allowed: finite float or null"),
        ("trainer.nonfinite=ask", "trainer.nonfinite=ask: allowed: stop, skip, rollback"),
        ("trainer.spike.window=1", "trainer.spike.window is 1; allowed: 2 or more"),
        ("trainer.spike=none", "trainer.spike=none: allowed: a section, whose keys are trainer.sp"),
        ("trainer.max_skips=-1", "trainer.max_skips is -1; allowed: 0 or more"),
        ("trainer.lost_rank_seconds=1", "trainer.lost_rank_seconds is 1; allowed: 2 or more"),
        ("trainer.hang_minutes=0", "trainer.hang_minutes is 0; allowed: above 0, or null"),
        ("trainer.profile.steps=[3,2]", "trainer.profile.steps is [3, 2]; allowed: [first, last]"),
        ("trainer.profile.ranks=[0,1]", "trainer.profile.ranks=[0, 1]: the run has 1; allowed: 0 "),
        ("trainer.router_bias_rate=-1", "trainer.router_bias_rate is -1; allowed: 0 or more"),
        ("checkpoint.keep_every=-1", "checkpoint.keep_every is -1; allowed: 0 or more"),
        ("checkpoint.background=1", "checkpoint.background=1: allowed: bool"),
        (
            "checkpoint.keep_best=2 eval.every=0",
            "checkpoint.keep_best=2: with eval.every=0 and checkpoint.every=200 not every",
        ),
        (
            "checkpoint.keep_best=2 eval.every=3 checkpoint.every=4",
            "checkpoint.keep_best=2: with eval.every=3 and checkpoint.every=4 not every",
        ),
        (
            "checkpoint.keep_best=2 eval.every=3 checkpoint.every=3 checkpoint.best_metric=eval_f1",
            "checkpoint.best_metric=eval_f1: eval.tasks give no such figure; allowed: eval_loss, ",
        ),
        ("checkpoint.best_direction=up", "checkpoint.best_direction=up: allowed: min, max"),
        ("eval.batches=0", "eval.batches is 0; allowed: 1 or more, or null"),
        ("eval.tasks=[f1]", "eval.tasks=f1: allowed: copy, kv, mqar, niah, perplexity, position"),
        ("eval.tasks=[kv,kv]", "eval.tasks is ['kv', 'kv']; allowed: each once"),
        ("eval.tasks=[kv] tasks.kv.depths=[2]", "tasks.kv.depths is [2]; allowed: one or more, "),
        (
            "eval.tasks=[kv] eval.every=9 tasks.kv.lengths=[3]",
            "tasks.kv.lengths: 3 tokens hold no example; ",
        ),
        (
            "eval.tasks=[position] eval.every=9 tasks.position.length=999",
            "tasks.position.length=999: no document of the split is so long; allowed: 2 to ",
        ),
        ("data.task=kv", "data.task=kv: allowed: null; data=task takes one"),
        (
            "data=task data.source=files data.task=position",
            "data.task=position: has no examples; allowed: copy, ",
        ),
        ("data=task data.task=f1", "Interpolation key 'tasks.f1' not found; full_key: data."),
        ("trainer.precision=fp8", "trainer.precision=fp8: allowed: fp32, bf16, fp64 or null"),
        ("optim.lr=${nothing}", "Interpolation key 'nothing' not found; full_key: optim.lr"),
        ("optim.lr=-1", "optim.lr is -1; allowed: above 0"),
        ("optim.eps=0", "optim.eps is 0; allowed: above 0"),
        ("schedule.decay=2", "schedule.decay is 2; allowed: 0 to 1"),
        ("parallel.cp=2", "parallel.cp is 2; parallel=single allows 1"),
        ("data.seq_len=0", "data.seq_len=0: "),
        ("data.path=/nowhere", "data.path=/nowhere: "),
        ("model.pattern=[kda,zeta]", "model.pattern names 'zeta'"),
        ("mixer.gqa.num_kv_heads=3 model=transformer", "mixer.gqa.num_kv_heads is 3"),
        ("model.vocab_size=10", "model.vocab_size=10: allowed: 258 (tokenizer) or more"),
        ("model.vocab_size=0", "model.vocab_size=0: allowed: 258 (tokenizer) or more"),
        ("model.vocab_size=all", "model.vocab_size=all: allowed: 258 (tokenizer) or more"),
        ("model.moe=false", "model.moe=False: allowed: a section, whose keys are model.moe.*"),
        ("mixer.kda=null", "mixer.kda=None: allowed: a section, whose keys are mixer.kda.*"),
        ("logging.wandb=maybe", "logging.wandb=maybe: allowed: off, offline, online"),
        ("resume=/nowhere", "resume=/nowhere: "),
        ("resume=3", "resume=3: allowed: str"),
        ("init_from=/nowhere", "init_from=/nowhere: no weights in /nowhere; allowed: "),
    ],
)
def test_bad_values_are_too(tmp_path, monkeypatch, capfd, argument, line):
    """Behind Hydra, which takes most of a second."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop, main.exit_codes("train"):
        main.train(compose(overrides(tmp_path, *argument.split())))
    close_logging()
    errors = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(errors) == 1 and errors[0].startswith(f"error: {line}"), errors


def test_a_home_folder_is_found_in_every_value_but_a_prompt(train, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["objective=kd", "objective.teacher=~/t", "model=init_from", "init_from=~/a b"]
    code, _, errors = train(*words, "run_dir='~/x'")
    assert code == 2 and errors[0].startswith("error: init_from=/home/me/a b: no weights in /home")
    listed = OmegaConf.create({"eval": {"tasks": ["~/y", "a~/y", 3]}, "prompt": "~/z"})
    assert main.plain(listed) == {"eval": {"tasks": ["/home/me/y", "a~/y", 3]}, "prompt": "~/z"}


def test_a_run_that_fails_says_why_and_exits_with_1(train, tmp_path):
    code, _, errors = train(*overrides(tmp_path, *QUICK, "optim.lr=1e30", "trainer.grad_clip=null"))
    assert code == 1
    assert len(errors) == 1 and errors[0].startswith("error: step 2: loss nan")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["outcome"] == "failed"
    assert status["reason"] == errors[0].removeprefix("error: ")


def test_a_held_out_loss_that_is_not_finite_ends_the_run(train, tmp_path):
    more = [*QUICK, "optim.lr=1e30", "trainer.grad_clip=null", "eval.every=1"]
    code, _, errors = train(*overrides(tmp_path, *more))
    assert code == 1
    assert errors == ["error: step 1: eval_loss nan on the held-out documents"]


def test_the_configuration_can_be_shown(train):
    code, out, _ = train("--cfg", "job", "model=transformer")
    assert code == 0
    assert yaml.safe_load(out)["model"]["pattern"] == ["gqa"]


def test_every_mixer_is_in_the_configuration(train):
    _, out, _ = train("--cfg", "job")
    files = (Path(__file__).parents[2] / "conf" / "mixer").glob("*.yaml")
    assert set(yaml.safe_load(out)["mixer"]) == {path.stem for path in files}
