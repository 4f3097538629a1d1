"""The store of one process: whole checkpoints or none."""

import json

import pytest
import torch

from tests.trainer.checkpoint.states import (
    draw,
    flip,
    load,
    make_state,
    names,
    same,
    save,
    warnings,
)
from trainer.checkpoint.keep import Keep
from trainer.checkpoint.store import CheckpointStore
from trainer.errors import ConfigError


@pytest.fixture(params=[False, True], ids=["sync", "background"])
def store(request, tmp_path):
    return CheckpointStore(tmp_path, background=request.param)


def test_what_is_saved_is_loaded_bit_for_bit(store, tmp_path):
    path = save(store, 7)
    assert path == tmp_path / "step_00000007"
    after = draw()
    state = make_state(0.0)
    tensor = state["model"]["layers.0.weight"]
    reader = store.reader(path)
    assert reader.progress == {"step": 7}
    reader.check(state)
    reader.fill({"optimizer": state["optimizer"]})  # in parts
    assert not same(state, make_state(7.0))
    reader.fill({"model": state["model"]})
    reader.fill({"model": {}})
    assert same(state, make_state(7.0))
    assert state["model"]["layers.0.weight"] is tensor  # filled in place
    reader.restore_generators()
    assert draw() == after
    assert (path / "config.yaml").read_text() == "model: {}\n"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["ranks"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_nothing_but_checkpoints_and_the_pointer_stays(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=Keep(newest=2))
    for step in (1, 2, 3, 10):
        save(store, step)
        assert (store.folder / "latest").read_text() == f"step_{step:08}\n"
    assert names(store) == ["latest", "step_00000003", "step_00000010"]


def test_the_best_are_kept_by_the_loss_in_their_manifests(tmp_path):
    store = CheckpointStore(tmp_path, keep=Keep(newest=1, every=4, best=1))
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 2.5, 1.5), start=1):
        save(store, step, figures={"eval_loss": loss})
    assert names(store) == ["latest", "step_00000002", "step_00000004", "step_00000006"]


def test_auto_takes_the_newest_and_nothing_from_an_empty_folder(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.resolve("auto") is None
    save(store, 9)
    path = save(store, 10)
    assert store.resolve("auto") == store.newest() == store.newest(last_step=10) == path
    assert store.newest(last_step=9).name == "step_00000009"
    assert store.newest(last_step=8) is None
    assert store.resolve("none") is None


def test_an_unfinished_one_is_skipped_and_swept_away(store, tmp_path, caplog):
    save(store, 1).rename(tmp_path / ".step_00000001")
    (tmp_path / "latest").unlink()
    assert store.resolve("auto") is None
    assert [".step_00000001" in line for line in warnings(caplog)] == [True]
    save(store, 2)
    assert names(store) == ["latest", "step_00000002"]


def test_a_run_that_went_back_writes_its_step_again(tmp_path):
    store = CheckpointStore(tmp_path, keep=Keep(newest=1))
    flip(save(store, 4) / "__0_0.distcp")
    save(store, 3)
    assert names(store) == ["latest", "step_00000003", "step_00000004"]  # nothing lost to damage
    path = save(store, 4, make_state(5.0))
    assert store.resolve("auto") == path
    assert names(store) == ["latest", "step_00000004"]
    assert same(load(store, path), make_state(5.0))


def test_auto_stays_on_the_branch_of_a_run_that_went_back(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (2, 4):
        save(store, step)
    back = save(store, 3)
    assert store.resolve("auto") == back
    line = "skipping checkpoint step_00000004: the run went back behind it"
    assert warnings(caplog) == [line]
    further = save(store, 6)
    assert store.resolve("auto") == further
    flip(further / ".metadata")
    flip(back / "manifest.json")  # 4 stays out, 3 and 6 are damaged
    (tmp_path / "latest").write_text("step_00000003\n")
    assert store.resolve("auto").name == "step_00000002"


def test_a_path_may_be_a_checkpoint_or_a_run_folder(tmp_path):
    path = save(CheckpointStore(tmp_path / "run" / "checkpoints"), 1)
    elsewhere = CheckpointStore(tmp_path / "other")
    assert elsewhere.resolve(str(path)) == path
    assert elsewhere.resolve(str(tmp_path / "run")) == path
    with pytest.raises(ConfigError, match=r"resume=.*nowhere: no complete checkpoint there; allow"):
        elsewhere.resolve(str(tmp_path / "nowhere"))


def test_a_path_is_where_a_run_begins_and_not_where_it_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", logger="trainer")
    path = save(CheckpointStore(tmp_path / "run" / "checkpoints"), 4)

    def resolve(resume):
        store = CheckpointStore(tmp_path / "checkpoints")
        return store, store.resolve(str(resume))

    save(resolve("auto")[0], 9)  # of a run that is given up
    for _ in range(2):  # killed before its first save
        store, taken = resolve(path)
        assert taken == path
    first = save(store, 6)
    assert resolve(path)[1] == first
    line = f"resume={path}: the run has gone on since; another run_dir starts there again"
    assert caplog.messages[-1] == line
    second = save(resolve("auto")[0], 8)
    assert resolve(path)[1] == second
    flip(second / "progress.json")
    assert resolve(path)[1] == first
    (tmp_path / "run").rename(tmp_path / "moved")
    assert resolve(path)[1] == first
    moved = tmp_path / "moved" / "checkpoints" / path.name
    assert resolve(moved)[1] == moved  # another start
    flip(first / "progress.json")
    with pytest.raises(ConfigError, match=r"is incomplete"):
        resolve(path)


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
def test_a_checkpoint_of_another_model_is_named(tmp_path, change, reason):
    store = CheckpointStore(tmp_path)
    path = save(store, 1)
    state = make_state(0.0)
    change(state)
    with pytest.raises(ConfigError, match=reason):
        store.reader(path).check(state)
