import os
import sysconfig
from pathlib import Path

import pytest

from trainer.data.source import build_source, files, standard_library
from trainer.errors import ConfigError


def test_every_regular_file_below_a_folder_sorted_by_name(tmp_path):
    contents = {".hidden": b"h", "a.bin": bytes(range(256)), "b/.c/d": b"", "b/e.txt": b"e"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert list(files(tmp_path)) == sorted(contents.items())


def test_one_file_is_one_document(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\0")
    (tmp_path / "b").write_bytes(b"other")
    assert list(build_source("files", str(tmp_path / "a"))) == [("a", b"\xff\0")]


def test_key_follows_names_sizes_and_times(tmp_path):
    first = tmp_path / "a"
    first.write_bytes(b"one")
    os.utime(first, (1, 1))
    keys = [files(tmp_path).key(), files(tmp_path).key()]
    assert keys[0] == keys[1]
    os.utime(first, (2, 2))
    keys.append(files(tmp_path).key())
    first.write_bytes(b"four")
    os.utime(first, (2, 2))
    keys.append(files(tmp_path).key())
    first.rename(tmp_path / "b")
    keys.append(files(tmp_path).key())
    assert len(set(keys)) == 4


def test_standard_library_is_python_source_without_packages():
    source = standard_library()
    root = Path(sysconfig.get_path("stdlib"))
    assert {"argparse.py", "json/decoder.py"} <= set(source.names)
    assert all(name.endswith(".py") for name in source.names)
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    assert not any(skipped & set(name.split("/")) for name in source.names)
    assert list(source.names) == sorted(source.names)
    name, content = next(iter(source))
    assert content == (root / name).read_bytes()


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
    source = files(tmp_path)
    (tmp_path / "a").unlink()
    for read in (source.key, lambda: list(source)):
        with pytest.raises(ConfigError, match=r"data\.path=.*cannot read .*/a: No such file"):
            read()


def test_source_must_be_known_and_complete():
    with pytest.raises(ConfigError, match=r"data\.source=web: must be stdlib or files"):
        build_source("web", None)
    with pytest.raises(ConfigError, match=r"data\.path=null: data=files needs"):
        build_source("files", None)
    with pytest.raises(ConfigError, match=r"data\.path=here: data=stdlib takes none"):
        build_source("stdlib", "here")
