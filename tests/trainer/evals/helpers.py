"""A text of small documents, with the byte tokenizer or one of Hugging Face."""

import json
from pathlib import Path

from tests.trainer.data.helpers import build, corpus
from trainer.data import Data
from trainer.data.text import Text

PROSE = "the quick brown fox jumps over some lazy dogs while another reader watches quietly. "
WORDS = 330  # of the tokenizer


def data(folder: Path, **changes) -> Data:
    (folder / "text").mkdir(exist_ok=True)
    for i in range(8):
        (folder / "text" / f"{i}").write_text(f"{i}: " + PROSE * (i + 1))
    return build(folder, **{"seq_len": 128, "eval_fraction": 0.4, **changes})


def text(folder: Path, **changes) -> Text:
    made = data(folder, **changes)
    return Text(corpus(made).store, made.tokenizer, corpus(made).documents("eval"))


def hugging_face(folder: Path, *, start: bool = False) -> str:
    """A tokenizer whose tokens are pieces of several letters; start: it puts <s>, 0, before."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<s>", "<eos>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([PROSE] * 4, trainer)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    path = folder / "tokenizer"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return str(path)
