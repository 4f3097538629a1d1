import json
import multiprocessing

import numpy as np
import pytest

from trainer.data import store as store_module
from trainer.data.source import files
from trainer.data.store import TokenStore, length_histogram, open_store
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError

CONTENTS = {"a": b"spam", "b/c": bytes(range(256)), "b/d": b"", "e\udcff": b"spam", "f": b"x" * 700}
FULL = {name: content for name, content in CONTENTS.items() if content}


class WideTokenizer(ByteTokenizer):
    """Ids on both sides of 2^16."""

    vocab_size = 2**16 + 64
    fingerprint = "wide"

    def encode(self, text):
        return super().encode(text) + np.uint32(2**16 - 200)


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_bytes(content)
    return tmp_path


def open_text(folder, tokenizer=None):
    return open_store(files(folder / "text"), tokenizer or ByteTokenizer(), folder / "cache")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()])
def test_holds_every_document_ended_by_eos(folder, tokenizer):
    store = open_text(folder, tokenizer)
    assert [store.name(i) for i in range(len(store))] == list(FULL)
    for i, content in enumerate(FULL.values()):
        assert store.read(i, 0, 10**9).tolist() == [*tokenizer.encode(content), 256]
    assert store.tokens == sum(map(len, FULL.values())) + len(FULL)
    assert store.lengths.tolist() == [len(content) + 1 for content in FULL.values()]
    assert sum(store.length_histogram) == len(FULL)
    assert store.tokenizer == tokenizer.fingerprint


def test_reads_parts_of_a_document_and_never_the_next(folder):
    store = open_text(folder)
    assert store.read(1, 250, 255).tolist() == [250, 251, 252, 253, 254]
    assert store.read(1, 255, 260).tolist() == [255, 256]
    assert store.read(1, 257, 260).tolist() == []


def test_copies_share_a_digest(folder):
    digests = open_text(folder).digests
    assert digests[0] == digests[2]
    assert len(set(digests.tolist())) == 3


def test_is_built_once_and_again_when_a_document_changes(folder, monkeypatch):
    builds, build = [], store_module.build_store

    def counted(*args):
        builds.append(args)
        build(*args)

    monkeypatch.setattr(store_module, "build_store", counted)
    first = open_text(folder)
    assert open_text(folder).hash == first.hash
    assert len(builds) == 1
    (folder / "text" / "a").write_bytes(b"eggs and ham")
    assert open_text(folder).hash != first.hash
    assert len(builds) == 2
    open_text(folder, WideTokenizer())
    assert len(builds) == 3


def test_hash_follows_content_alone(folder):
    first = open_text(folder).hash
    (folder / "text").rename(folder / "moved")
    assert open_store(files(folder / "moved"), ByteTokenizer(), folder / "other").hash == first


def _open_hash(folder, hashes):
    hashes.put(open_text(folder).hash)


def test_processes_may_build_at_once(folder):
    context = multiprocessing.get_context("fork")  # quick, and safe: the children run no tensors
    hashes = context.Queue()
    processes = [context.Process(target=_open_hash, args=(folder, hashes)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {hashes.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert found == {open_text(folder).hash}
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 1


def test_a_machine_that_lost_the_race_takes_the_winner(folder, monkeypatch):
    build = store_module.build_store

    def overtaken(staging, source, tokenizer):
        build(staging, source, tokenizer)
        name = staging.name.split(".")[1]
        build(staging.parent / name, source, tokenizer)

    monkeypatch.setattr(store_module, "build_store", overtaken)
    assert len(open_text(folder)) == len(FULL)
    assert [path.name[0] for path in (folder / "cache").iterdir() if path.is_dir()] != ["."]


def test_a_failed_build_leaves_nothing_and_can_be_repeated(folder, monkeypatch):
    def encode(self, text):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(ByteTokenizer, "encode", encode)
        open_text(folder)
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]
    assert len(open_text(folder)) == len(FULL)


@pytest.mark.parametrize("file", ["tokens.bin", "index.npy", "meta.json"])
def test_a_truncated_store_is_refused(folder, file):
    open_text(folder)
    (path,) = (folder / "cache").glob(f"*/{file}")
    content = path.read_bytes()
    for size in (0, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigError, match="is damaged, delete it"):
            open_text(folder)


def test_another_format_is_refused(folder):
    open_text(folder)
    (path,) = (folder / "cache").glob("*/meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        TokenStore(path.parent)


def test_empty_files_alone_are_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").touch()
    with pytest.raises(ConfigError, match=r"data\.path=.*every file is empty"):
        open_text(tmp_path)


def test_an_unusable_cache_names_the_key(folder):
    (folder / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot write"):
        open_text(folder)


def test_length_histogram_by_powers_of_two():
    assert length_histogram(np.array([1, 2, 3, 4, 7, 8, 1024])) == [1, 2, 2, 1, *[0] * 6, 1]
