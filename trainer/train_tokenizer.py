"""The command that trains a byte-level BPE tokenizer on the documents of any source."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from trainer.construct import call
from trainer.data import build_data
from trainer.data.opening import PLACE, locate
from trainer.data.prepare import unfinished
from trainer.data.source import Source
from trainer.data.store import TokenStore
from trainer.data.tokenizer import TOKENIZER, build_tokenizer, pieces
from trainer.errors import ConfigError

BYTES = 256  # ids that any text can be spelled with

log = logging.getLogger(__name__)


def write_tokenizer(
    *,
    data: Mapping[str, Any],
    output: str,
    vocab_size: int,
    end_of_document: str,
    padding: str,
    max_mb: int | None,
) -> str:
    """-> the folder, for `data.tokenizer` and for transformers' AutoTokenizer.

    The keywords are the keys of conf/train_tokenizer.yaml. Raises ConfigError.
    """
    call(build_data, data, "data", partial=True)  # for the types of the values
    special = list(dict.fromkeys((end_of_document, padding)))
    if vocab_size < BYTES + len(special):
        raise ConfigError(
            f"vocab_size={vocab_size}: must be at least {BYTES + len(special)}, for all bytes and "
            f"{' '.join(special)}"
        )
    if max_mb is not None and max_mb < 1:
        raise ConfigError(f"max_mb={max_mb}: must be at least 1, or null")
    folder = Path(output)
    if folder.exists():
        raise ConfigError(f"output={output}: it exists; allowed: a new folder")
    source = locate(**{key: data[key] for key in PLACE})
    if isinstance(source, TokenStore):
        raise ConfigError(f"data.path={data['path']}: a token store has no text to train on")
    log.info("training a tokenizer of %d tokens on %s", vocab_size, source.label)
    texts = _texts(source, None if max_mb is None else max_mb * 10**6)
    trained = _train(texts, source.label, vocab_size, special)
    if trained.get_vocab_size() < vocab_size:
        log.info("the text gives no more than %d tokens", trained.get_vocab_size())
    _publish(trained, folder, eos_token=end_of_document, pad_token=padding)
    return output


def _texts(source: Source, limit: int | None) -> Iterator[str]:
    """Documents in order, long ones in pieces, until there are so many bytes."""
    read = 0
    for part in source.slices():
        for record in source.read(part):
            for piece in pieces(record.content):
                yield piece.decode("utf-8", errors="replace")
            read += len(record.content)
            if limit is not None and read >= limit:
                return


def _train(
    texts: Iterator[str], label: str, vocab_size: int, special: list[str]
) -> tokenizers.Tokenizer:
    first = next((text for text in texts if text), None)
    if first is None:
        raise ConfigError(f"{label}: no text, every document is empty")
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )

    def chained() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer.train_from_iterator(chained(), trainer)
    return tokenizer


def _publish(tokenizer: tokenizers.Tokenizer, folder: Path, **roles: str) -> None:
    """The folder appears by one rename, once it is known to be read again."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    staging = unfinished(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        tokenizer.save(str(staging / TOKENIZER))
        (staging / "tokenizer_config.json").write_text(json.dumps(config | roles, indent=2) + "\n")
        build_tokenizer(str(staging))
        staging.rename(folder)
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot write: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
