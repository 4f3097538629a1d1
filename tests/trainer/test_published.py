"""A published model with its own tokenizer, of a size that is no round number, in every command."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

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
    folder = hugging_face(place)
    randomise(LlamaForCausalLM(LLAMA)).save_pretrained(folder)
    return place


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


def test_every_command_takes_a_vocabulary_of_any_size(place, capsys):
    words = [f"checkpoint={source(place)}", "prompt=the quick", "tokens=3"]
    assert "".join(call(write_text, compose(words, "generate"), "")).startswith("the quick")
    words = [f"checkpoint={source(place)}", *data(place)]
    config = compose(words, "evaluate") | {"split": "all"}
    assert call(run_task, config, "", mesh=join())["tokens"] > 0
    build(place, "run").run()
    assert records(place / "run")[0]["loss"] > 0
    words = [f"source={source(place)}", f"target={place / 'linear'}", "recipe=linear"]
    main.convert(compose([*words, *data(place), "recipe.calibration_tokens=100"], "convert"))
    assert (place / "linear" / "report.json").exists()
