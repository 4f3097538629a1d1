"""A published model with its own tokenizer, of a size that is no round number, in every command."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from parallel.mesh import join
from tests.models.build import compose, randomise
from tests.trainer.evals.helpers import WORDS, hugging_face
from tests.trainer.tiny import overrides, records
from trainer import main
from trainer.build import build_trainer
from trainer.construct import call
from trainer.evaluate import run_task
from trainer.generation import write_text
from trainer.load import take_model
from trainer.loop import Trainer

LLAMA = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=40,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """With the model in place/tokenizer."""
    place = tmp_path_factory.mktemp("published")
    folder = hugging_face(place, start=True)
    randomise(LlamaForCausalLM(LLAMA)).save_pretrained(folder)
    return place


@pytest.fixture(scope="module")
def peer(place) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(place / "tokenizer").eval()


@pytest.fixture(scope="module")
def ids(place) -> Callable[[str], list[int]]:
    """Of a text, as transformers gives it to the model."""
    return lambda text: AutoTokenizer.from_pretrained(place / "tokenizer")(text)["input_ids"]


def source(place: Path) -> str:
    return str(place / "tokenizer")


def data(place: Path) -> list[str]:
    return [word for word in overrides(place) if word.startswith("data")]


def build(place: Path, run: str, *words: str) -> Trainer:
    """Of a run of one step in place/run, that goes on from the model."""
    (place / run).mkdir(exist_ok=True)
    more = [f"init_from={source(place)}", "trainer.steps=1", f"run_dir={place / run}", *words]
    config = compose([*data(place), "trainer.keep_heap=false", *more]) | {"model": "init_from"}
    config = take_model(config, tokenizer_given=False)
    return build_trainer(config, mesh=join(), run_dir=place / run)


def write(place: Path, *words: str) -> str:
    words = (f"checkpoint={source(place)}", *words)
    return "".join(call(write_text, compose([*words], "generate"), ""))


def evaluate(place: Path, *words: str) -> dict:
    words = (f"checkpoint={source(place)}", *data(place), *words)
    return call(run_task, compose([*words], "evaluate") | {"split": "all"}, "", mesh=join())


def test_every_command_takes_a_vocabulary_of_any_size(place, capsys):
    assert write(place, "prompt=the quick", "tokens=3").startswith("the quick")
    assert evaluate(place)["tokens"] > 0
    build(place, "run").run()
    assert records(place / "run")[0]["loss"] > 0
    words = [f"source={source(place)}", f"target={place / 'linear'}", "recipe=linear"]
    main.convert(compose([*words, *data(place), "recipe.calibration_tokens=100"], "convert"))
    assert (place / "linear" / "report.json").exists()


def test_a_prompt_is_read_as_transformers_reads_it(place, peer, ids):
    prompt = torch.tensor([ids("the lazy reader")])
    assert prompt[0, 0] == 0 and (prompt[0, 1:] > 1).all()
    text = write(place, "prompt=the lazy reader", "tokens=12", "temperature=0")
    seen = torch.ones_like(prompt)
    whole = peer.generate(prompt, attention_mask=seen, max_new_tokens=12, do_sample=False)
    expected = AutoTokenizer.from_pretrained(source(place)).decode(
        whole[0], skip_special_tokens=True
    )
    assert text == expected


def test_documents_are_scored_behind_the_start_token(place, peer, ids):
    total, count = 0.0, 0
    for file in (place / "documents").iterdir():
        tokens = torch.tensor([[*ids(file.read_text()), 1]])
        total += peer(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    figures = evaluate(place)
    assert figures["tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)


def test_windows_in_the_middle_of_a_document_have_a_start_token_too(place, peer, ids):
    losses = []
    for file in (place / "documents").iterdir():
        tokens = [*ids(file.read_text())[1:], 1]
        for start in range(0, len(tokens) - 6, 7):
            window = torch.tensor([[0, *tokens[start : start + 7]]])
            logits = peer(window).logits[0, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
            )
    expected = torch.stack(losses).mean(0)
    figures = evaluate(place, "task=position", "tasks.position.length=8")
    assert figures["loss_1"] == pytest.approx(expected[0].item(), rel=1e-5)
    assert figures["loss_4"] == pytest.approx(expected[3:].mean().item(), rel=1e-5)


def test_a_trained_model_is_exported_as_its_source_was(place):
    if not (place / "run").exists():
        build(place, "run").run()
    main.convert(
        compose([f"source={place / 'run'}", f"target={place / 'hf'}", "format=hf"], "convert")
    )
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    first, last = (LlamaConfig.from_pretrained(folder) for folder in (source(place), place / "hf"))
    assert [getattr(last, name) for name in names] == [getattr(first, name) for name in names]
    assert first.max_position_embeddings == 40
    assert last.max_position_embeddings == 48  # of the rows that it has read
    assert (place / "hf" / "tokenizer.json").exists()
