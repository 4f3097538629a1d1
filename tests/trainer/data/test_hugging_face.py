"""Datasets of `datasets`: local files and folders; a hub that cannot be reached is one line."""

import json

import datasets
import pytest

from tests.trainer.data.test_store import bytes_of, prepare_as
from trainer.data.formats import build_source
from trainer.errors import ConfigError

TEXTS = [f"document {i} " * (i % 11) for i in range(60)]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.fixture
def folder(tmp_path):
    """The same documents as files of JSON, and as what `save_to_disk` writes."""
    (tmp_path / "files").mkdir()
    for part in range(3):
        lines = [json.dumps({"n": 1, "text": text}) for text in TEXTS[part * 20 : part * 20 + 20]]
        (tmp_path / "files" / f"{part}.jsonl").write_text("\n".join(lines))
    saved = datasets.Dataset.from_dict({"n": [1] * 60, "text": TEXTS})
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=saved, other=saved.select([1])).save_to_disk(tmp_path / "splits")
    return tmp_path


def source(path, **keys):
    return build_source("hf", str(path), **{"column": "text", "split": "train", **keys})


def test_every_kind_gives_the_documents_that_our_own_reader_gives(folder):
    ours = build_source("jsonl", str(folder / "files"), column="text")
    expected = prepare_as(folder, "ours", ours)
    kinds = {
        "folder": source(folder / "files"),
        "streamed": source(folder / "files", streaming=True),
        "saved": source(folder / "saved"),
        "splits": source(folder / "splits"),
    }
    stores = {name: prepare_as(folder, f"{name}_", kind, 500) for name, kind in kinds.items()}
    assert {store.hash for store in stores.values()} == {expected.hash}
    assert stores["saved"].name(7) == f"{folder / 'saved'}:9"
    assert stores["streamed"].name(18) == f"{folder / 'files'}#1:1"
    again = prepare_as(folder, "again", source(folder / "files"), 500, workers=2)
    assert bytes_of(again) == bytes_of(stores["folder"])
    one = source(folder / "files" / "1.jsonl")
    assert len(prepare_as(folder, "one", one)) == 18
    assert len(prepare_as(folder, "other", source(folder / "splits", split="other"))) == 1


def test_key_follows_files_and_configuration(folder):
    path = folder / "files"
    keys = [source(path).key(), source(path).key()]
    assert keys[0] == keys[1]
    keys += [source(path, column="n").key(), source(folder / "saved").key()]
    (path / "1.jsonl").write_text(json.dumps({"n": 1, "text": "x"}))
    assert len({*keys, source(path).key()}) == 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("path", "keys", "message"),
    [
        ("files", {"column": "t"}, r"data\.column=t: .*such column; it has: n, text$"),
        ("files", {"column": "n"}, r"data\.column=n: .*files.*:1 is not text but int"),
        ("files", {"split": "test"}, r"data\.path=.*test.*train"),
        ("files", {"subset": "de"}, r"data\.path=.*de.*default"),
        ("saved", {"subset": "de"}, r"data\.subset=de"),
        ("splits", {"split": "test"}, r"data\.split=test: .*has: train, other$"),
        ("files/1.jsonl", {"subset": "de"}, r"data\.subset=de"),
        ("nowhere", {}, r"data\.path=.*nowhere"),
        ("bad", {}, r"data\.path=.*bad"),
    ],
)
def test_bad_input_is_one_line(folder, path, keys, message, streaming):
    (folder / "bad").mkdir()
    (folder / "bad" / "a.jsonl").write_text('{"text": "x"}\n{"te\n')
    with pytest.raises(ConfigError, match=message) as raised:
        prepare_as(folder, "out", source(folder / path, streaming=streaming, **keys))
    assert "\n" not in str(raised.value)
    assert not (folder / "out").exists()


def test_a_hub_out_of_reach_is_one_line():
    with pytest.raises(ConfigError, match=r"^data\.path=no/such: .*Hub"):
        build_source("hf", "no/such", column="text", split="train").key()
