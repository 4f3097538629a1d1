"""From texts to a tokenizer, to a token store, to training on it: the commands of the data."""

import json
import sys

import pytest
import transformers

from tests.trainer.tiny import MODEL, QUICK, records
from trainer import main
from trainer.console import close_logging
from trainer.data.store import TokenStore
from trainer.data.tokenizer import build_tokenizer

TEXTS = [f"def spam_{i}(eggs):\n    return eggs or 'spam {i}'\n" * (i % 5 + 1) for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"code": text}) for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capfd):
    """Runs a command line in this process; -> its output, or its one line of error."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(name: str, *arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            main.command(name, getattr(main, name))
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        if code:
            assert err.count("\n") == 1, err
        return err if code else out

    yield run
    close_logging()


SOURCE = ["data=jsonl", "data.path=texts.jsonl", "data.column=code"]
SMALL = [*MODEL, *QUICK, "data.seq_len=48", "data.batch_size=4", "data.eval_fraction=0.3"]
SMALL += ["trainer.keep_heap=false", "schedule.total_steps=4", "trainer.precision=fp64"]


@pytest.fixture
def prepared(run, folder):
    """A tokenizer and a store made with it."""
    if not (folder / "store").exists():
        assert run("train_tokenizer", *SOURCE, "vocab_size=300", "output=bpe").endswith("bpe\n")
        out = run("prepare_data", *SOURCE, "data.tokenizer=bpe", "output=store", "workers=1")
        assert "30 documents" in out.splitlines()[-1]
    return folder


def test_a_trained_tokenizer_is_that_of_transformers_too(prepared):
    ours = build_tokenizer(str(prepared / "bpe"))
    theirs = transformers.AutoTokenizer.from_pretrained(prepared / "bpe")
    text = TEXTS[7] + "naïve \N{SNAKE} \t\r\n  end"
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    assert len(theirs) == 300 and len(ids) < 0.6 * len(text)


def test_inspection_shows_what_is_in_it(run, prepared):
    out = run("prepare_data", "output=store", "--inspect", "verify=true", "samples=2")
    store = TokenStore(prepared / "store")
    assert f"30 documents, {store.tokens:,} tokens" in out and store.hash in out
    assert "texts.jsonl: " in out and "100.00%" in out
    assert "tokens of texts.jsonl:16:\n    def spam_15(eggs):\n        return" in out
    assert "all 5 files are as they were written" in out
    path = prepared / "store" / "tokens_000000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\1")
    error = run("prepare_data", "output=store", "inspect=true", "verify=true", code=2)
    assert error.startswith("error: output=store: ") and "tokens_000000.bin is damaged" in error
    path.write_bytes(content)


def test_nothing_is_overwritten_and_a_repeated_command_is_done(run, prepared):
    same = [*SOURCE, "data.tokenizer=bpe", "output=store", "workers=1"]
    assert "it is there already" in run("prepare_data", *same)
    assert "output=" in run("prepare_data", *SOURCE, "output=store", code=2)
    assert "output=bpe" in run("train_tokenizer", "output=bpe", code=2)
    assert "output=" in run("prepare_data", "output=bpe", code=2)
    assert "no token store" in run("prepare_data", "output=none", "inspect=true", code=2)
    assert "verify=true" in run("prepare_data", "output=none", "verify=true", code=2)
    assert "column=text" in run("prepare_data", *SOURCE[:2], "output=none", code=2)
    assert "vocab_size=256" in run("train_tokenizer", "vocab_size=256", "output=none", code=2)
    again = run("prepare_data", "data=store", "data.path=store", "output=none", code=2)
    assert "is a token store already" in again
    assert not (prepared / "none").exists()


def test_trains_on_a_store_with_its_own_tokenizer_and_no_other(run, prepared):
    stored = ["data=store", "data.path=store", *SMALL]
    out = run("train", *stored, "trainer.steps=2", "run_dir=stored", "eval.every=2")
    assert "eval_loss" in out
    error = run("train", *stored, "data.tokenizer=bytes", "run_dir=other", code=2)
    fingerprint = TokenStore(prepared / "store").tokenizer
    assert fingerprint in error and "bytes-1" in error and "data.tokenizer" in error
    cached = [*SOURCE, "data.tokenizer=bpe", "data.cache_dir=cache", *SMALL]
    run("train", *cached, "trainer.steps=2", "run_dir=cached")
    losses = [[r["loss"] for r in records(prepared / name)] for name in ("stored", "cached")]
    assert losses[0] == losses[1]


def test_trains_on_a_stream_and_goes_on_where_it_was(run, prepared):
    streamed = [*SOURCE, "data.tokenizer=bpe", "data.streaming=true", "data.window=2", *SMALL]
    streamed += ["data.cache_dir=never", "eval.every=2", "checkpoint.every=2", "trainer.steps=4"]
    assert "eval_loss" in run("train", *streamed, "run_dir=whole")
    half = prepared / "whole" / "checkpoints" / "step_00000002"
    assert "resumed from" in run("train", *streamed, "run_dir=half", f"resume={half}")
    losses = [[r["loss"] for r in records(prepared / name)] for name in ("whole", "half")]
    assert losses[0][2:] == losses[1] and len(losses[1]) == 2
    assert not (prepared / "never").exists()
    assert "data.streaming=true" in run("evaluate", "checkpoint=whole", code=2)
    stored = ["data=store", "data.path=store", "data.streaming=true", *SMALL, "run_dir=none"]
    assert "allowed: false" in run("train", *stored, code=2)
