"""A hybrid that no preset has, from the command line: train, resume, evaluate, write, convert."""

import json
import sys

import pytest
import torch
import transformers

from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.trainer.tiny import QUICK, overrides
from trainer import main
from trainer.console import close_logging
from trainer.evaluate import take_over
from trainer.generation import generate
from trainer.load import load_model

HYBRID = ["model.pattern=[mla,kda]", "model.num_layers=3", "mixer.kda.head_dim=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command line in this process; -> its standard output; errors go to standard error."""

    def run(name: str, *arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.command(name, getattr(main, name))
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        return err if code else out

    yield run
    close_logging()


def load(path, dtype=torch.float32):
    return load_model(str(path), ops=Ops(), device=torch.device("cpu"), dtype=dtype, vocab_size=320)


@pytest.fixture
def trained(run, folder):
    """The run folder; two steps, then two more resumed."""
    if not (folder / "run").exists():
        common = [
            *QUICK,
            *HYBRID,
            "schedule.total_steps=4",
            "tasks.kv.lengths=[47]",
            "tasks.kv.samples=2",
        ]
        run("train", *overrides(folder, *common, "trainer.steps=2"))
        assert "resumed from" in run("train", *overrides(folder, *common))
    return folder / "run"


def test_the_hybrid_is_what_was_asked_for(trained):
    model = load(trained)
    assert model.pattern == ["mla", "kda", "mla"]
    assert model.layers[1].mixer.head_dim == 4


def test_exports_to_transformers_and_back(trained, folder, run):
    for source, target, format in ((trained, "hf", "hf"), ("hf", "native", "native")):
        run("convert", f"source={source}", f"target={target}", f"format={format}")
    ours, back = load(trained), load(folder / "native")
    torch.testing.assert_close(ours.state_dict(), back.state_dict(), rtol=0, atol=0)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokens = torch.arange(50).unsqueeze(0)
    hidden = ours(tokens, SequenceInfo.span(1, 0, 50))
    torch.testing.assert_close(
        hidden @ ours.head_weight.mT, peer(tokens).logits, rtol=1e-5, atol=1e-5
    )


def test_greedy_text_is_that_of_full_forwards(trained):
    model = load(trained, torch.float64)
    prompt = torch.tensor([[100, 101, 32], [5, 6, 7]])
    written = torch.stack([*generate(model, prompt, tokens=9)], dim=1)
    tokens = prompt
    for _ in range(9):
        hidden = model(tokens, SequenceInfo.span(2, 0, tokens.shape[1]))
        likeliest = (hidden[:, -1] @ model.head_weight.mT).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, likeliest], dim=1)
    assert torch.equal(tokens[:, 3:], written)


def test_sampling_keeps_within_its_bounds(trained):
    model = load(trained)
    prompt = torch.zeros(64, 1, dtype=torch.int64)
    hidden = model(prompt, SequenceInfo.span(64, 0, 1))
    order = (hidden[0, -1] @ model.head_weight.mT).argsort(descending=True)
    for bounds in ({"top_k": 3}, {"top_p": 1e-6}):
        (drawn,) = generate(
            model, prompt, tokens=1, temperature=5.0, generator=torch.Generator(), **bounds
        )
        assert set(drawn.tolist()) <= set(order[: bounds.get("top_k", 1)].tolist())
        assert len(set(drawn.tolist())) == bounds.get("top_k", 1)


def test_generate_prints_the_prompt_and_the_same_text_for_the_same_seed(trained, run):
    command = (f"checkpoint={trained}", "prompt=the ", "tokens=8", "seed=3")
    first = run("generate", *command)
    assert first.startswith("the ")
    assert run("generate", *command) == first


@pytest.mark.parametrize(
    "prompt", ["def ", "42", r"f(x): 'a\'[{1, 2}] # \\", r"${x} \${y}", "two\nlines", "caf\udcc3"]
)
def test_a_prompt_is_taken_as_it_is(trained, run, prompt):
    written = run("generate", f"checkpoint={trained}", f"prompt={prompt}", "tokens=1")
    assert written.startswith(prompt.replace("\udcc3", "\ufffd"))  # a byte that is not UTF-8


def test_evaluate_scores_every_token_of_a_named_source_once(trained, run, folder):
    (folder / "text").write_text("a quick brown dog" * 20)
    command = [f"checkpoint={trained}", "data=files", f"data.path={folder / 'text'}"]
    command += ["data.seq_len=64", f"data.cache_dir={folder / 'cache'}"]
    figures = json.loads(run("evaluate", *command).splitlines()[-1])
    model = load(trained)
    tokens = torch.tensor([[*(folder / "text").read_bytes(), 256]])
    total = 0.0
    for start in range(0, tokens.shape[1], 64):
        piece = tokens[:, start : start + 65]
        hidden = model(piece[:, :64], SequenceInfo.span(1, 0, piece[:, :64].shape[1]))
        logits = (hidden @ model.head_weight.mT)[0, : piece.shape[1] - 1]
        total += float(torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
    assert figures["tokens"] == tokens.shape[1] - 1
    assert figures["loss"] == pytest.approx(total / figures["tokens"], rel=1e-5)


def test_evaluate_without_a_source_takes_what_training_held_out(trained, run):
    figures = json.loads(run("evaluate", f"checkpoint={trained}").splitlines()[-1])
    whole = json.loads(run("evaluate", f"checkpoint={trained}", "split=all").splitlines()[-1])
    assert 0 < figures["tokens"] < whole["tokens"]


def test_evaluate_asks_what_training_would_have_asked(trained, run):
    kv = (f"checkpoint={trained}", "task=kv", "tasks.kv.depths=[0.0,0.5]")
    figures = json.loads(run("evaluate", *kv).splitlines()[-1])
    assert [name for name in figures if name.startswith("accuracy_")] == ["accuracy_47"]
    assert [cell["depth"] for cell in figures["cells"]] == [0.0, 0.5]
    figures = json.loads(run("evaluate", *kv, "tasks.kv.lengths=[45]").splitlines()[-1])
    assert [name for name in figures if name.startswith("accuracy_")] == ["accuracy_45"]


def test_what_the_command_line_gives_stands_before_what_the_run_had():
    section = {"seq_len": 4, "long_documents": {"above": 5, "repeat": 2}, "path": None}
    run = {"seq_len": 8, "long_documents": {"above": 7, "repeat": 3}, "path": "here"}
    taken = take_over("data", section, run, ["data.seq_len", "data.long_documents.above", "path"])
    assert taken == {"seq_len": 4, "long_documents": {"above": 5, "repeat": 3}, "path": "here"}


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("generate", ["prompt=a", "tokens=0"], "tokens=0: allowed: 1 or more"),
        ("generate", ["prompt="], "prompt is empty"),
        ("generate", ["prompt=a", "top_p=0"], "top_p=0: allowed: above 0"),
        ("evaluate", ["task=nosuch"], "task=nosuch: allowed: copy, kv, lm_eval, mqar, "),
        ("convert", ["target=new", "format=onnx"], "format=onnx: allowed: hf, native"),
    ],
)
def test_bad_input_is_one_line(trained, run, name, arguments, line):
    source = "source" if name == "convert" else "checkpoint"
    errors = run(name, f"{source}={trained}", *arguments, code=2).splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ") and line in errors[0]


def test_a_truncated_weight_file_is_named(trained, run, folder):
    run("convert", f"source={trained}", "target=cut", "format=hf")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = run("generate", "checkpoint=cut", "prompt=a", code=2)
    assert line.startswith("error: checkpoint=cut: ")
    assert "model.safetensors" in line and len(line.splitlines()) == 1
