"""Every file of a checkpoint, flipped or cut: noticed, told in one line, the one before used."""

import shutil

import pytest

from tests.trainer.checkpoint.states import flip, save, warnings
from trainer.checkpoint.store import CheckpointStore
from trainer.errors import ConfigError

FILES = {
    ".metadata",
    "__0_0.distcp",
    "config.yaml",
    "manifest.json",
    "progress.json",
    "rng_00000.pt",
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    store = CheckpointStore(folder)
    whole, newest = save(store, 1), save(store, 2)
    assert {path.name for path in newest.iterdir()} == FILES
    assert whole.name == "step_00000001"
    return folder


@pytest.fixture
def resolve(pristine, tmp_path, caplog):
    """-> what `auto` takes of a copy after `harm`, and the lines of warning."""

    def resolve(harm):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        harm(folder)
        caplog.clear()
        taken = CheckpointStore(folder).resolve("auto")
        return taken and taken.name, warnings(caplog)

    return resolve


def places(size):
    """Bytes to change: the first, the last and some between."""
    return sorted({0, size - 1, *range(7, size, max(1, size // 12))})


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_flip_is_noticed(resolve, pristine, name):
    whole = (pristine / "step_00000002" / name).read_bytes()
    for place in places(len(whole)):
        for bit in (1, 32):
            data = bytearray(whole)
            data[place] ^= bit

            def flipped(folder, data=data):
                (folder / "step_00000002" / name).write_bytes(data)

            taken, lines = resolve(flipped)
            assert taken == "step_00000001" and len(lines) == 1, (place, bit, lines)
            assert lines[0].startswith("skipping checkpoint step_00000002: ")
            assert f"step_00000002/{name} is damaged" in lines[0]


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_cut_is_noticed(resolve, pristine, name):
    whole = (pristine / "step_00000002" / name).read_bytes()
    harms = [lambda path, n=n: path.write_bytes(whole[:n]) for n in (0, 1, len(whole) - 1)]
    harms += [lambda path: path.write_bytes(whole + b"\n"), lambda path: path.unlink()]
    for harm in harms:
        taken, lines = resolve(lambda folder, harm=harm: harm(folder / "step_00000002" / name))
        assert taken == "step_00000001" and len(lines) == 1, lines
        assert name in lines[0]


def test_where_none_is_whole_nothing_starts_afresh(resolve):
    def harm(folder):
        flip(folder / "step_00000001" / "progress.json")
        (folder / "step_00000002" / "manifest.json").unlink()

    line = r"copy holds checkpoints, none of them whole \(the newest: .*step_00000002 is incomplete"
    with pytest.raises(ConfigError, match=line):
        resolve(harm)


def test_the_pointer_alone_misleads_nobody(resolve, pristine):
    whole = (pristine / "latest").read_bytes()
    assert resolve(lambda folder: None) == ("step_00000002", [])
    assert resolve(lambda folder: (folder / "latest").unlink()) == ("step_00000002", [])
    changed = [
        bytes([*whole[:i], whole[i] ^ bit, *whole[i + 1 :]])
        for i in range(len(whole))
        for bit in (1, 2, 128)
    ]
    older = whole.replace(b"2", b"1")
    for data in [b"", whole[:-3], b"\xff\xfe\x00garbage", b"step_00000099\n", older, *changed]:
        taken, lines = resolve(lambda folder, data=data: (folder / "latest").write_bytes(data))
        assert taken == "step_00000002", data
        assert len(lines) == 1 and "latest is " in lines[0], (data, lines)


def test_an_explicit_one_is_refused_with_its_reason(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "copy")
    path = tmp_path / "copy" / "step_00000002"
    (path / "progress.json").unlink()
    store = CheckpointStore(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"progress.json is missing"):
        store.resolve(str(path))
    (path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"is incomplete: it has no manifest.json"):
        store.resolve(str(path))
    with pytest.raises(ConfigError, match=r"is incomplete: it has no manifest.json"):
        store.resolve(str(tmp_path / "step_00000007"))
