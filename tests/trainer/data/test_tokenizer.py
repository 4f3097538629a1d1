import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from trainer.data.tokenizer import ByteTokenizer, build_tokenizer, pieces
from trainer.errors import ConfigError

TEXT = "def spam(eggs):\n    return eggs or 'spam'\n"


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE of some merges, whose file truncates and pads as if saved after use."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, eos_token={"content": "<eos>"}, pad_token="<pad>")
    return tmp_path


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_bytes_round_trip_any_content():
    tokenizer, content = ByteTokenizer(), bytes(range(256)) * 3
    ids = tokenizer.encode(content)
    assert ids.tolist() == list(content)
    assert tokenizer.decode(ids) == content.decode(errors="replace")
    text = "naïve Σ \N{SNAKE}\r\n\0"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_vocabulary():
    tokenizer = build_tokenizer("bytes")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (256, 257, 258)
    assert tokenizer.decode([104, 105, 256, 257, 319]) == "hi"
    assert len(tokenizer.encode(b"")) == 0


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_hugging_face_round_trip(folder, name):
    tokenizer = build_tokenizer(str(folder / name))
    ids = tokenizer.encode(TEXT * 5)
    assert 8 < len(ids) < len(TEXT * 5)  # merged, and neither truncated nor padded
    assert tokenizer.decode(ids) == TEXT * 5
    assert tokenizer.encode((TEXT * 5).encode()).tolist() == ids.tolist()
    assert len(tokenizer.encode("spam")) <= 4
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 280)
    assert tokenizer.decode(np.append(ids, tokenizer.eos_id)) == TEXT * 5


def test_a_long_text_is_cut_behind_lines_and_encoded_as_one(folder, monkeypatch):
    text = (TEXT * 40 + "é" * 50 + "\n\n  x\n").encode() * 3
    whole = build_tokenizer(str(folder)).encode(text)
    for size in (20, 100, 1000):
        parts = list(pieces(text, size))
        assert b"".join(parts) == text
        assert len(parts) > len(text) // (3 * size)
        assert all(size <= len(part) <= 2 * size + 3 for part in parts[:-1])
        for part in parts:
            part.decode()  # no character is cut
        monkeypatch.setattr("trainer.data.tokenizer.pieces", lambda text, n=size: pieces(text, n))
        if size > 100:  # no line end is out of reach
            assert build_tokenizer(str(folder)).encode(text).tolist() == whole.tolist()
    assert list(pieces(b"", 4)) == [b""]
    assert list(pieces(b"x" * 10, 4)) == [b"x" * 8, b"xx"]


def test_pickled_it_still_takes_text_for_text(folder):
    tokenizer = pickle.loads(pickle.dumps(build_tokenizer(str(folder))))
    assert tokenizer.eos_id not in tokenizer.encode("a<eos>b")
    assert len(tokenizer.encode(TEXT * 5)) > 8


def put_before(folder, template, tokens):
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [(token, made.token_to_id(token)) for token in tokens]
    template = processors.TemplateProcessing(template, None, ids)
    made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    made.no_truncation()
    made.no_padding()
    made.save(str(folder / "tokenizer.json"))


def test_a_start_token_is_known_by_what_a_text_gets(folder):
    before = build_tokenizer(str(folder))
    assert before.start == ByteTokenizer.start == ()
    for template, start in (("<pad> $A <eos>", (0,)), ("$A <eos>", ())):
        put_before(folder, template, ["<pad>", "<eos>"])
        tokenizer = build_tokenizer(str(folder))
        assert tokenizer.start == pickle.loads(pickle.dumps(tokenizer)).start == start
        ids = tokenizer.encode(TEXT).tolist()
        assert ids == before.encode(TEXT).tolist()
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(TEXT)
        assert [*start, *ids, tokenizer.eos_id] == theirs["input_ids"]
        assert tokenizer.fingerprint != before.fingerprint
    put_before(folder, "<pad> <eos> $A", ["<pad>", "<eos>"])
    with pytest.raises(ConfigError, match=r"tokens \[0, 1\] before a text; allowed: one or none"):
        build_tokenizer(str(folder))


def test_text_cannot_forge_an_end_of_document(folder):
    tokenizer = build_tokenizer(str(folder))
    assert tokenizer.eos_id not in tokenizer.encode("a<eos>b")
    assert tokenizer.decode(tokenizer.encode("a<eos>b")) == "a<eos>b"


def test_content_that_is_not_utf8_becomes_replacement_characters(folder):
    tokenizer = build_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"


def test_fingerprint_follows_content_and_special_tokens(folder):
    before = build_tokenizer(str(folder)).fingerprint
    assert build_tokenizer(str(folder / "tokenizer.json")).fingerprint == before
    write_config(folder, eos_token="<pad>")
    after = build_tokenizer(str(folder))
    assert after.fingerprint != before
    assert after.pad_id == after.eos_id == 0
    assert ByteTokenizer.fingerprint not in (before, after.fingerprint)


@pytest.mark.parametrize("config", [{}, {"eos_token": None}, {"eos_token": "<missing>"}])
def test_end_of_document_must_be_named(folder, config):
    write_config(folder, **config)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*eos_token"):
        build_tokenizer(str(folder))


def test_unusable_paths_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*nowhere.*must be"):
        build_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*not a tokenizer"):
        build_tokenizer(str(tmp_path))
