import gzip
import json
import os
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import jsonl
from trainer.data.formats import build_source, standard_library
from trainer.data.source import Slice, units
from trainer.errors import ConfigError


def read(source):
    """(name, row in its slice, content) of all records."""
    return [(part.name, *record) for part in source.slices() for record in source.read(part)]


def files(path):
    return build_source("files", str(path))


def contents(source):
    return [content for _, _, content in read(source)]


def test_every_regular_file_below_a_folder_sorted_by_name(tmp_path):
    contents = {".hidden": b"h", "a.bin": bytes(range(256)), "b/.c/d": b"", "b/e.txt": b"e"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert read(files(tmp_path)) == [(name, 0, contents[name]) for name in sorted(contents)]


def test_one_file_is_one_document(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\0")
    (tmp_path / "b").write_bytes(b"other")
    assert read(files(tmp_path / "a")) == [("a", 0, b"\xff\0")]


def test_keys_follow_what_they_say(tmp_path):
    first = tmp_path / "one" / "a"
    first.parent.mkdir()
    first.write_bytes(b"one")
    os.utime(first, (1, 1))
    keys, outlines = [], []

    def note():
        source = files(first.parent)
        keys.append(source.key())
        outlines.append(source.outline())

    note()
    os.utime(first, (2, 2))
    note()
    first.parent.rename(tmp_path / "two")
    first = tmp_path / "two" / "a"
    note()
    assert len(set(keys)) == 3 and len(set(outlines)) == 1
    first.write_bytes(b"four")
    note()
    first.rename(first.with_name("b"))
    note()
    assert len(set(keys)) == 5 and len(set(outlines)) == 3
    (first.with_name("b")).rename(first.with_name("b.jsonl"))
    columns = [build_source("jsonl", str(first.parent), column=c).key() for c in ("x", "y")]
    assert columns[0] != columns[1]


def test_standard_library_is_python_source_without_packages():
    source = standard_library()
    root = Path(sysconfig.get_path("stdlib"))
    assert {"argparse.py", "json/decoder.py"} <= set(source.names)
    assert all(name.endswith(".py") for name in source.names)
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    assert not any(skipped & set(name.split("/")) for name in source.names)
    assert list(source.names) == sorted(source.names)
    part = source.slices()[0]
    assert next(source.read(part)).content == (root / part.name).read_bytes()


@pytest.mark.parametrize("slice_bytes", [1, 7, 64, 2**20])
def test_each_line_of_json_is_read_once_wherever_slices_end(tmp_path, monkeypatch, slice_bytes):
    monkeypatch.setattr(jsonl, "SLICE_BYTES", slice_bytes)
    texts = ["short", "", "line\nend", "é" * 40, "x" * 300, None, "last"]
    lines = [json.dumps({"n": 1, "text": text}).encode() for text in texts]
    lines.insert(3, b"  ")  # blank
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))  # and no line end behind the last
    source = build_source("jsonl", str(tmp_path), column="text")
    expected = [(text or "").encode() for text in texts]
    expected.insert(3, b"")
    assert contents(source) == expected


def test_json_keeps_what_is_no_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"t": "a\xffb"}\n{"t": "\\ud800"}\n')
    source = build_source("jsonl", str(tmp_path / "a.jsonl"), column="t")
    assert contents(source) == [b"a\xffb", b"\xed\xa0\x80"]


def test_compressed_lines_and_other_files(tmp_path):
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(b'{"t": "one"}\n{"t": "two"}\n')
    (tmp_path / "notes.txt").write_text("no JSON")
    source = build_source("jsonl", str(tmp_path), column="t")
    assert read(source) == [("b.jsonl.gz", 1, b"one"), ("b.jsonl.gz", 2, b"two")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"t": "x"}\n\n{"t": "y}\n', r"a\.jsonl:3: no JSON: Unterminated string.*column 7$"),
        (b'{"t": "x"}\n[1]\n', r"a\.jsonl:2: not a JSON object"),
        (b'{"t": "x"}\n{"u": 1, "v": 2}\n', r"data\.column=t: .*a\.jsonl:2 .*it has: u, v$"),
        (b'{"t": "x"}\n{"t": ["y"]}\n', r"data\.column=t: a\.jsonl:2 is not text but list"),
    ],
)
@pytest.mark.parametrize("slice_bytes", [4, 2**20])
def test_a_bad_line_is_named(tmp_path, monkeypatch, text, message, slice_bytes):
    monkeypatch.setattr(jsonl, "SLICE_BYTES", slice_bytes)
    (tmp_path / "a.jsonl").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        read(build_source("jsonl", str(tmp_path), column="t"))


def test_a_damaged_archive_is_named(tmp_path):
    whole = gzip.compress(b'{"t": "one"}\n' * 100)
    for content in (whole[:-9], b"no gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"data\.path=.*a\.jsonl\.gz"):
            read(build_source("jsonl", str(tmp_path), column="t"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_rows_of_parquet(tmp_path, kind):
    texts = ["a", "", None, "é", "b" * 99]
    table = pa.table({"n": [1] * 5, "text": pa.array(texts, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = build_source("parquet", str(tmp_path), column="text")
    assert contents(source) == [(text or "").encode() for text in texts]
    assert [part.start for part in source.slices()] == [0, 1, 2]
    assert [row for _, row, _ in read(source)] == [1, 2, 1, 2, 1]


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "u": ["x", "y"]}), path)
    with pytest.raises(ConfigError, match=r"data\.column=t: .*a\.parquet .*it has: n, u$"):
        read(build_source("parquet", str(tmp_path), column="t"))
    with pytest.raises(ConfigError, match=r"data\.column=n: a\.parquet is not text but int64"):
        read(build_source("parquet", str(tmp_path), column="n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"data\.path=.*a\.parquet is damaged or no Parquet"):
        read(build_source("parquet", str(tmp_path), column="u"))


def test_units_are_consecutive_and_of_a_size():
    parts = [Slice(str(i), 0, size, size) for i, size in enumerate([1, 2, 9, 1, 1, 1, 0])]
    made = units(parts, 3)
    assert [[part.size for part in unit] for unit in made] == [[1, 2], [9], [1, 1, 1], [0]]
    assert [part for unit in made for part in unit] == parts
    assert units([], 3) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "cannot read"), ("pipe", "must be a regular file"), ("empty", "no regular file")],
)
def test_unusable_paths_name_the_key(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"data\.path=.*{name}.*{message}"):
        files(tmp_path / name)


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    source, other = files(tmp_path), files(tmp_path)
    part = source.slices()[0]
    (tmp_path / "a").unlink()
    for ask in (other.key, lambda: list(source.read(part))):
        with pytest.raises(ConfigError, match=r"data\.path=.*cannot read .*/a: No such file"):
            ask()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "web"}, r"data\.source=web: must be stdlib, files"),
        ({"source": "files"}, r"data\.path=null: data=files needs"),
        ({"source": "stdlib", "path": "here"}, r"data\.path=here: data=stdlib takes none"),
        ({"source": "files", "path": "x", "column": "t"}, r"data\.column=t: data=files takes none"),
        ({"source": "jsonl", "path": "x"}, r"data\.column=null: data=jsonl needs one"),
        (
            {"source": "jsonl", "path": "x", "column": "t", "split": "a"},
            r"data\.split=a: .*data=hf",
        ),
    ],
)
def test_source_must_be_known_and_complete(keys, message):
    with pytest.raises(ConfigError, match=message):
        build_source(**keys)
