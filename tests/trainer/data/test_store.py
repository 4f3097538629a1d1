import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

from trainer.data import assemble, jsonl, part
from trainer.data import prepare as preparing
from trainer.data.formats import build_source
from trainer.data.lock import locked
from trainer.data.opening import locate, open_documents
from trainer.data.prepare import Way, open_store, prepare
from trainer.data.store import TokenStore, length_histogram
from trainer.data.tokenizer import ByteTokenizer
from trainer.errors import ConfigError

CONTENTS = {
    "a": b"spam",
    "b/c": bytes(range(256)),
    "b/d": b"",
    "e\udcff": b"spam",
    "f": b"x" * 700,
    "g": b"",  # alone in a unit of one byte
}
FULL = {name: content for name, content in CONTENTS.items() if content}
ALONE = Way(workers=1, wait_minutes=1)


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


def text_of(folder, name="text"):
    return build_source("files", str(folder / name))


def open_text(folder, tokenizer=None, way=ALONE):
    return open_store(text_of(folder), tokenizer or ByteTokenizer(), folder / "cache", way)


def prepare_as(folder, name, source, unit_bytes=1, workers=1):
    way = Way(workers=workers, unit_bytes=unit_bytes)
    output, work = folder / name, folder / f".{name}"
    return prepare(source, ByteTokenizer(), output, work=work, way=way, place="output=x")


def bytes_of(store):
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


def published(folder):
    return [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]


@pytest.mark.parametrize("unit_bytes", [1, 200, 2**20])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WideTokenizer()])
def test_holds_every_document_ended_by_eos(folder, tokenizer, unit_bytes):
    store = open_text(folder, tokenizer, Way(workers=1, unit_bytes=unit_bytes))
    assert [store.name(i) for i in range(len(store))] == list(FULL)
    for i, content in enumerate(FULL.values()):
        assert store.read(i, 0, 10**9).tolist() == [*tokenizer.encode(content), 256]
    assert store.tokens == sum(map(len, FULL.values())) + len(FULL)
    assert store.lengths.tolist() == [len(content) + 1 for content in FULL.values()]
    assert sum(store.length_histogram) == len(FULL)
    assert (store.tokenizer, store.empty_documents) == (tokenizer.fingerprint, 2)
    assert len(store.shards) == {1: 4, 200: 2, 2**20: 1}[unit_bytes]


def test_reads_parts_of_a_document_and_never_the_next(folder):
    store = open_text(folder)
    assert store.read(1, 250, 255).tolist() == [250, 251, 252, 253, 254]
    assert store.read(1, 255, 260).tolist() == [255, 256]
    assert store.read(1, 257, 260).tolist() == []


def test_goes_to_another_process_as_its_path(folder):
    store = open_text(folder)
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert pickle.loads(sent).read(0, 0, 9).tolist() == store.read(0, 0, 9).tolist()


def test_copies_share_a_digest(folder):
    digests = open_text(folder).digests
    assert digests[0] == digests[2]
    assert len(set(digests.tolist())) == 3


@pytest.mark.parametrize("slice_bytes", [30, 2**20])
@pytest.mark.parametrize("unit_bytes", [1, 100, 2**20])
def test_rows_are_counted_through_slices_and_shards(folder, monkeypatch, slice_bytes, unit_bytes):
    monkeypatch.setattr(jsonl, "SLICE_BYTES", slice_bytes)
    (folder / "lines").mkdir()
    for name in "ab":
        texts = [f"{name} {i}" * (i % 7) for i in range(40)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / "lines" / f"{name}.jsonl").write_text("\n".join(lines))
    source = build_source("jsonl", str(folder / "lines"), column="text")
    store = prepare_as(folder, "out", source, unit_bytes)
    expected = [f"{name}.jsonl:{i + 1}" for name in "ab" for i in range(40) if i % 7]
    assert [store.name(i) for i in range(len(store))] == expected
    assert [name for name, _ in store.tokens_by_file()] == ["a.jsonl", "b.jsonl"]


def test_is_built_once_and_again_when_a_document_changes(folder, monkeypatch):
    builds, build = [], preparing._prepare

    def counted(*args):
        builds.append(args)
        build(*args)

    monkeypatch.setattr(preparing, "_prepare", counted)
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
    assert prepare_as(folder, "other", text_of(folder, "moved")).hash == first
    lines = [json.dumps({"t": content.decode("latin-1")}) for content in (b"spam", b"eggs")]
    (folder / "a.jsonl").write_text("\n".join(lines))
    for name, content in (("1", b"spam"), ("2", b"eggs")):
        (folder / "same" / name).parent.mkdir(exist_ok=True)
        (folder / "same" / name).write_bytes(content)
    as_lines = build_source("jsonl", str(folder / "a.jsonl"), column="t")
    hashes = [prepare_as(folder, "x", as_lines), prepare_as(folder, "y", text_of(folder, "same"))]
    assert hashes[0].hash == hashes[1].hash != first


def test_bytes_do_not_follow_the_number_of_workers(folder):
    source = text_of(folder)
    stores = [prepare_as(folder, str(n), source, workers=n) for n in (1, 2)]
    assert bytes_of(stores[0]) == bytes_of(stores[1])
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name[0] == "."]


def _open_hash(folder, hashes):
    hashes.put(open_text(folder).hash)


def _refuse_lock(*args):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", [True, False])
def test_processes_may_build_at_once(folder, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", _refuse_lock)
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


def test_the_wait_for_another_process_has_an_end(folder):
    with locked(folder / "out", minutes=0), pytest.raises(ConfigError, match="cache_wait_minutes"):
        prepare_as(folder, "out", text_of(folder))
    assert len(prepare_as(folder, "out", text_of(folder))) == len(FULL)


def test_a_machine_that_lost_the_race_takes_the_winner(folder, monkeypatch):
    first, build = prepare_as(folder, "other", text_of(folder)), preparing.assemble

    def overtaken(store, *args, **keywords):
        build(store, *args, **keywords)
        first.folder.rename(folder / "out")

    monkeypatch.setattr(preparing, "assemble", overtaken)
    assert len(prepare_as(folder, "out", text_of(folder))) == len(FULL)
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name[0] == "."]


def _die_at(folder, module, name, call):
    """Prepares, and is killed when `name` is called for that time."""
    calls, real = [], getattr(module, name)

    def counted(*args, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keywords)

    setattr(module, name, counted)
    prepare_as(folder, "out", text_of(folder))


@pytest.mark.parametrize(
    ("module", "name", "call", "kept"),
    [
        (part, "_write_documents", 1, 0),
        (part, "_write_documents", 3, 2),
        (part, "write_manifest", 4, 3),
        (part, "sync_folder", 2, 2),
        (assemble, "_fill", 1, 5),
        (assemble, "shard_name", 2, 4),  # one is moved already
        (assemble, "write_manifest", 1, 1),  # all but the one without tokens are
        (preparing, "sync_folder", 1, None),  # published
    ],
)
def test_a_kill_leaves_nothing_half_written_and_is_resumed_bit_for_bit(
    folder, monkeypatch, module, name, call, kept
):
    whole = bytes_of(prepare_as(folder, "whole", text_of(folder)))
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_die_at, args=(folder, module, name, call))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (folder / "out").exists() == (kept is None)
    made, write = [], preparing.write_part
    monkeypatch.setattr(preparing, "write_part", lambda *x: (made.append(x[1]), write(*x)))
    assert bytes_of(prepare_as(folder, "out", text_of(folder))) == whole
    assert len(made) == (0 if kept is None else 5 - kept)


def test_damaged_or_foreign_leftovers_are_not_used(folder):
    whole = bytes_of(prepare_as(folder, "whole", text_of(folder)))
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_die_at, args=(folder, assemble, "_fill", 1))
    child.start()
    child.join()
    (tokens,) = (folder / ".out" / "parts" / "000001").glob("tokens.bin")
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    assert bytes_of(prepare_as(folder, "out", text_of(folder))) == whole
    (folder / ".new" / "parts").mkdir(parents=True)
    (folder / ".new" / "made_from").write_text("another source")
    (folder / ".new" / "parts" / "000000").mkdir()
    assert bytes_of(prepare_as(folder, "new", text_of(folder))) == whole


def test_a_failed_build_leaves_nothing_and_can_be_repeated(folder, monkeypatch):
    def encode(self, text):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(ByteTokenizer, "encode", encode)
        open_text(folder)
    assert not published(folder / "cache")
    assert len(open_text(folder)) == len(FULL)


def test_a_full_disk_is_one_line_and_nothing_is_published(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    for module, name in ((part, "_write_documents"), (part.np, "save"), (assemble, "_fill")):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ConfigError, match=r"^output=x: cannot write .*: No space left"),
        ):
            patch.setattr(module, name, full)
            prepare_as(folder, "out", text_of(folder))
        assert not (folder / "out").exists()


@pytest.mark.parametrize("file", ["tokens_000000.bin", "index.npy", "manifest.json", "names.jsonl"])
def test_a_truncated_store_is_refused(folder, file):
    open_text(folder)
    (path,) = (folder / "cache").glob(f"*/{file}")
    content = path.read_bytes()
    for size in (0, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=rf"token store .* cannot be used: .*{file}"):
            open_text(folder)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"token store .*{file}"):
        open_text(folder)


@pytest.mark.parametrize("file", ["tokens_000001.bin", "index.npy", "names.jsonl"])
def test_a_flipped_bit_is_found_by_reading_all(folder, file):
    store = prepare_as(folder, "out", text_of(folder))
    store.verify()
    content = bytearray((store.folder / file).read_bytes())
    content[-3] ^= 4
    (store.folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file} is damaged"):
        TokenStore(store.folder).verify()


def test_another_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(assemble, "FORMAT", 99)
    with pytest.raises(ConfigError, match="format 99, this version reads 2"):
        open_text(folder)


def test_a_store_made_with_another_tokenizer_is_refused(folder):
    store = prepare_as(folder, "out", text_of(folder))
    place = locate(source="store", path=str(store.folder))
    rest = {"cache_dir": folder, "way": ALONE}
    assert open_documents(place, tokenizer=ByteTokenizer(), **rest).hash == store.hash
    with pytest.raises(ConfigError, match=r"made with the tokenizer bytes-1, .* is wide"):
        open_documents(place, tokenizer=WideTokenizer(), **rest)
    with pytest.raises(ConfigError, match=r"data\.path=.*no token store"):
        locate(source="store", path=str(folder / "nowhere"))


def test_empty_files_alone_are_refused(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").touch()
    with pytest.raises(ConfigError, match=r"data\.path=.*no text, every document is empty"):
        open_text(tmp_path)
    assert not published(tmp_path / "cache")


def test_an_unusable_cache_names_the_key(folder):
    (folder / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*cannot write"):
        open_text(folder)


def test_length_histogram_by_powers_of_two():
    assert length_histogram(np.array([1, 2, 3, 4, 7, 8, 1024])) == [1, 2, 2, 1, *[0] * 6, 1]
