"""Text to token ids and back: plain bytes, or a tokenizer.json of Hugging Face tokenizers."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from trainer.checkpoint.manifest import MANIFEST, read_manifest
from trainer.errors import ConfigError

# Matrix dimensions of 64 keep the head on fast kernels and divisible by common degrees of sharding.
VOCAB_MULTIPLE = 64
TOKENIZER = "tokenizer.json"
DESCRIPTIONS = ("special_tokens_map.json", "tokenizer_config.json")  # the later one wins

# A longer text is encoded in pieces: an encoding takes more than a hundred times its text.
PIECE_BYTES = 2**20
# Where a piece may end without a trace: tokenizers that split words, byte-level BPE above all,
# look no further than from a line to the next one's first character.
_LINE_END = re.compile(rb"\S\n(?=\S)")


class Tokenizer(Protocol):
    """A document is `start`, its text and eos_id; pad_id fills rows and is never predicted."""

    vocab_size: int  # the highest id, and one
    start: tuple[int, ...]  # what comes before each document and prompt: nothing, or one token
    eos_id: int
    pad_id: int
    fingerprint: str  # equal for two tokenizers only if they give equal ids

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        """[tokens], without any special token."""
        ...

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """Special tokens vanish; bytes that are not UTF-8 become U+FFFD."""
        ...

    def vocabulary(self) -> dict[str, int]:
        """Word -> id; what ids mean is the same for two tokenizers of one vocabulary."""
        ...

    def save(self, folder: Path) -> None:
        """Puts it into a token store, from where `build_tokenizer` takes it again."""
        ...


def padded(size: int) -> int:
    """The vocabulary of a model that is made for a tokenizer of so many ids."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def as_bytes(text: bytes | str) -> bytes:
    """Bytes of the command line that are not UTF-8 arrive as lone surrogates, and become again."""
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogateescape")


def pieces(text: bytes, size: int = PIECE_BYTES) -> Iterator[bytes]:
    """The text in parts of `size` bytes or little more.

    A part ends behind a line that the next one follows at once. Where there is none for another
    `size` bytes it ends inside a line, between two characters, and a tokenizer that would merge
    over that place gives other ids than for the whole text.
    """
    start = 0
    while len(text) - start > size:
        least = start + size
        line = _LINE_END.search(text, least, least + size)
        stop = line.end() if line else least + size
        while stop < len(text) and text[stop] & 0xC0 == 0x80:  # inside a character of UTF-8
            stop += 1
        yield text[start:stop]
        start = stop
    yield text[start:]


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 ends a document, 257 pads; reads any content."""

    start: tuple[int, ...] = ()
    eos_id = 256
    pad_id = 257
    vocab_size = 258
    fingerprint = "bytes-1"

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        return np.frombuffer(as_bytes(text), np.uint8)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def vocabulary(self) -> dict[str, int]:
        return {f"<0x{byte:02X}>": byte for byte in range(256)}

    def save(self, folder: Path) -> None:
        """Nothing: a store's fingerprint says that its tokens are bytes."""


class HuggingFaceTokenizer:
    """A tokenizer.json, or a folder with one; its config names the end-of-document token.

    Whether there is a start token its post-processor tells. Raises ConfigError if there is no such
    file, it cannot be read, or no `eos_token` is named.
    """

    def __init__(self, path: Path) -> None:
        file = path / TOKENIZER if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"data.tokenizer={path}: must be `bytes`, a tokenizer.json, a folder with one, or "
                "a token store"
            )
        self._file = file
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
        self.start = self._put_before("a")
        if len(self.start) > 1:
            raise ConfigError(
                f"data.tokenizer={path}: it puts the tokens {list(self.start)} before a text; "
                "allowed: one or none"
            )
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        special = (self.eos_id, self.pad_id, *self.start)
        content = file.read_bytes() + " ".join(map(str, special)).encode()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: bytes | str) -> NDArray[np.integer]:
        """Bytes that are not UTF-8 become U+FFFD; see `pieces` for what is long."""
        parts = [part.decode("utf-8", errors="replace") for part in pieces(as_bytes(text))]
        ids = [np.array(self._encode(part), np.uint32) for part in parts]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def _encode(self, text: str) -> list[int]:
        # The form for batches is faster, as it keeps no offsets.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _put_before(self, text: str) -> tuple[int, ...]:
        """The special tokens in front where the tokenizer is asked for any."""
        encoding = self._tokenizer.encode(text)
        tokens = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(token for token, _ in takewhile(lambda pair: pair[1], tokens))

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def save(self, folder: Path) -> None:
        shutil.copyfile(self._file, folder / TOKENIZER)
        for name in DESCRIPTIONS:
            if (self._file.parent / name).is_file():
                shutil.copyfile(self._file.parent / name, folder / name)

    def __reduce__(self) -> tuple:
        """By its file: what `tokenizers` pickles has lost `encode_special_tokens`."""
        return HuggingFaceTokenizer, (self._file,)


def _special_tokens(folder: Path) -> dict[str, str]:
    """Role -> text, from the files that describe a tokenizer.json."""
    config: dict = {}
    for name in DESCRIPTIONS:
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_bytes())
    tokens = ((role, config.get(role)) for role in ("eos_token", "pad_token"))
    return {role: t["content"] if isinstance(t, dict) else t for role, t in tokens if t}


def build_tokenizer(name: str) -> Tokenizer:
    """`bytes`, the path of a Hugging Face tokenizer, or a token store for the one it was made with.

    Raises ConfigError.
    """
    path = Path(name).expanduser()
    if name == "bytes" or _of_bytes(path / MANIFEST):
        return ByteTokenizer()
    return HuggingFaceTokenizer(path)


def is_tokenizer(name: str) -> bool:
    """Whether there is one of that name, for `build_tokenizer`."""
    path = Path(name).expanduser()
    file = path.is_file() or (path / TOKENIZER).is_file()
    return file or name == "bytes" or _of_bytes(path / MANIFEST)


def _of_bytes(manifest: Path) -> bool:
    """Whether this is the manifest of a token store whose tokens are bytes."""
    if not manifest.is_file():
        return False
    return read_manifest(manifest.parent).get("tokenizer") == ByteTokenizer.fingerprint
