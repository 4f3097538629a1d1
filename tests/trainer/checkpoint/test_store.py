"""The store of one process: whole checkpoints or none."""

import json
import logging

import pytest
import torch

from tests.trainer.checkpoint.states import draw, make_state, same
from trainer.checkpoint.store import CheckpointStore
from trainer.errors import ConfigError


def save(store, step, value=None):
    value = float(step) if value is None else value
    return store.save(step, make_state(value), progress={"loss": value / 3}, config="model: {}\n")


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    path = save(store, 7)
    assert path == tmp_path / "step_00000007"
    after = draw()
    state = make_state(0.0)
    tensor = state["model"]["layers.0.weight"]
    assert store.progress(path) == {"loss": 7.0 / 3}
    store.load(path, state)
    assert same(state, make_state(7.0))
    assert state["model"]["layers.0.weight"] is tensor  # filled in place
    assert draw() == after
    assert (path / "config.yaml").read_text() == "model: {}\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["ranks"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_nothing_but_checkpoints_and_the_pointer_stays(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3, 10):
        save(store, step)
        assert (store.folder / "latest").read_text() == f"step_{step:08}\n"
    assert names(store) == ["latest", "step_00000003", "step_00000010"]


@pytest.mark.parametrize("keep", [0, -1])
def test_all_are_kept_where_keep_is_not_positive(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep=keep)
    for step in (1, 2, 3):
        save(store, step)
    assert len(names(store)) == 4


def test_auto_takes_the_newest_and_nothing_from_an_empty_folder(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=0)
    assert store.resolve("auto") is None
    save(store, 9)
    path = save(store, 10)
    assert store.resolve("auto") == path
    assert store.resolve("none") is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("manifest.json", lambda path: path.unlink(), "is incomplete: it has no manifest.json"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json is damaged"),
        ("progress.json", lambda path: path.unlink(), "progress.json is missing"),
        ("__0_0.distcp", flip, "__0_0.distcp is damaged: its SHA-256"),
        (".metadata", lambda path: path.write_bytes(b"x"), r"\.metadata is damaged: 1 bytes"),
        ("rng_00000.pt", flip, "rng_00000.pt is damaged"),
    ],
)
def test_a_damaged_one_is_skipped_with_its_reason(tmp_path, caplog, file, harm, reason):
    store = CheckpointStore(tmp_path, keep=0)
    whole, damaged = save(store, 1), save(store, 2)
    harm(damaged / file)
    with caplog.at_level(logging.WARNING):
        assert store.resolve("auto") == whole
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "step_00000002" in warnings[0]
    with pytest.raises(ConfigError, match=reason):
        store.resolve(str(damaged))


def test_an_unfinished_one_is_skipped_and_swept_away(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=0)
    path = save(store, 1)
    path.rename(tmp_path / ".step_00000001")
    with caplog.at_level(logging.WARNING):
        assert store.resolve("auto") is None
    assert ".step_00000001" in caplog.text
    save(store, 2)
    assert names(store) == ["latest", "step_00000002"]


def test_a_run_that_went_back_writes_its_step_again(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    flip(save(store, 4) / "__0_0.distcp")
    save(store, 3)
    assert names(store) == ["latest", "step_00000003", "step_00000004"]  # nothing lost to damage
    path = save(store, 4, value=5.0)
    assert store.resolve("auto") == path
    assert names(store) == ["latest", "step_00000004"]
    state = make_state(0.0)
    store.load(path, state)
    assert same(state, make_state(5.0))


def test_auto_stays_on_the_branch_of_a_run_that_went_back(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=0)
    for step in (2, 4):
        save(store, step)
    back = save(store, 3)
    with caplog.at_level(logging.WARNING):
        assert store.resolve("auto") == back
    assert "skipping checkpoint step_00000004: the run went back behind it" in caplog.text


def test_a_path_may_be_a_checkpoint_or_a_run_folder(tmp_path):
    path = save(CheckpointStore(tmp_path / "run" / "checkpoints", keep=0), 1)
    elsewhere = CheckpointStore(tmp_path / "other", keep=0)
    assert elsewhere.resolve(str(path)) == path
    assert elsewhere.resolve(str(tmp_path / "run")) == path
    with pytest.raises(ConfigError, match=r"resume=.*nowhere: no complete checkpoint there; allow"):
        elsewhere.resolve(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s["model"].pop("router.bias"), r"another model: 1 unexpected \(router.bias\)"),
        (lambda s: s["model"].update(new=torch.ones(1)), r"another model: 1 missing \(new\)"),
        (
            lambda s: s["model"].update({"router.bias": torch.zeros(3)}),
            r"misshapen \(router.bias is \[2\], not \[3\]\)",
        ),
        (
            lambda s: s["optimizer"].pop("state.layers.0.weight.step"),
            r"another optimizer: 1 unexpected \(state.layers.0.weight.step\)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_fills_nothing(tmp_path, change, reason):
    store = CheckpointStore(tmp_path, keep=0)
    path = save(store, 1)
    state = make_state(0.0)
    change(state)
    with pytest.raises(ConfigError, match=reason):
        store.load(path, state)
    assert torch.equal(
        state["model"]["layers.0.weight"], make_state(0.0)["model"]["layers.0.weight"]
    )


def test_a_failed_save_leaves_the_last_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    path = save(store, 1)
    with pytest.raises(RuntimeError, match=r"rank 0: TypeError"):
        store.save(2, make_state(2.0), progress={"x": object()}, config="")
    assert store.resolve("auto") == path
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
