"""Text to token ids and back: plain bytes, or a tokenizer.json of Hugging Face tokenizers."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from trainer.errors import ConfigError

# Matrix dimensions of 64 keep the head on fast kernels and divisible by common degrees of sharding.
VOCAB_MULTIPLE = 64


class Tokenizer(Protocol):
    """The store appends eos_id to each document; pad_id fills rows and is never predicted."""

    vocab_size: int  # a multiple of VOCAB_MULTIPLE, above every id
    eos_id: int
    pad_id: int
    fingerprint: str  # equal for two tokenizers only if they give equal ids

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        """[tokens], without any special token."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Special tokens vanish; bytes that are not UTF-8 become U+FFFD."""
        ...


def padded(size: int) -> int:
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def as_bytes(text: bytes | str) -> bytes:
    """Bytes of the command line that are not UTF-8 arrive as lone surrogates, and become again."""
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogateescape")


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 ends a document, 257 pads; reads any content."""

    eos_id = 256
    pad_id = 257
    vocab_size = padded(258)
    fingerprint = "bytes-1"

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        return np.frombuffer(as_bytes(text), np.uint8)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, or a folder with one; its config names the end-of-document token.

    Raises ConfigError if there is none, it cannot be read, or no `eos_token` is named.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"data.tokenizer={path}: must be `bytes`, a tokenizer.json or a folder with one"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            config = _special_tokens(file.parent)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"data.tokenizer={path}: not a tokenizer: {error}") from error
        # A tokenizer.json may carry the truncation and padding of its last use. Documents keep
        # their full length, and text that spells a special token stays text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        eos_id = self._tokenizer.token_to_id(config.get("eos_token", ""))
        if eos_id is None:
            raise ConfigError(
                f"data.tokenizer={path}: tokenizer_config.json beside {file.name} must name an "
                f"`eos_token` of the vocabulary, which ends each document"
            )
        pad_id = self._tokenizer.token_to_id(config.get("pad_token", ""))
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.vocab_size = padded(max(self._tokenizer.get_vocab().values()) + 1)
        content = file.read_bytes() + f"{self.eos_id} {self.pad_id}".encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        readable = as_bytes(text).decode("utf-8", errors="replace")
        ids = self._tokenizer.encode(readable, add_special_tokens=False).ids
        return np.array(ids, np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _special_tokens(folder: Path) -> dict[str, str]:
    """Role -> text, from the files that describe a tokenizer.json; the later one wins."""
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_bytes())
    tokens = ((role, config.get(role)) for role in ("eos_token", "pad_token"))
    return {role: t["content"] if isinstance(t, dict) else t for role, t in tokens if t}


def build_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the path of a Hugging Face tokenizer."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(Path(name).expanduser())
