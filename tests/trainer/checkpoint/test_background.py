"""Saves beside training: what they hold, who waits for whom, what is told when they fail."""

import contextlib
import errno
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.checkpoint.states import (
    files_up_to,
    load,
    make_state,
    names,
    same,
    save,
    warnings,
)
from trainer.checkpoint import saving
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.keep import Keep
from trainer.checkpoint.staging import HostBuffers
from trainer.checkpoint.store import CheckpointStore
from trainer.errors import TrainingError

BOTH = pytest.mark.parametrize("background", [False, True], ids=["sync", "background"])
FULL = OSError(errno.ENOSPC, "No space left on device", "/checkpoints/file")


@pytest.fixture
def gate(monkeypatch):
    """Holds copies and writes back until they are let through; `seen` tells when they arrive."""
    names = ("copied", "copy", "writing", "write")
    gate = SimpleNamespace(**{name: threading.Event() for name in names})
    copy, write = HostBuffers.copy, saving.write_shards

    def gated_copy(self, state):
        gate.copied.set()
        assert gate.copy.wait(20)
        return copy(self, state)

    def gated_write(*args):
        gate.writing.set()
        assert gate.write.wait(20)
        return write(*args)

    monkeypatch.setattr(HostBuffers, "copy", gated_copy)
    monkeypatch.setattr(saving, "write_shards", gated_write)
    yield gate
    gate.copy.set()
    gate.write.set()


def start(store, step, state):
    store.save(step, state, progress={}, config="")


def waiting(action):
    """A thread in `action`, and whether it ended within a moment."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(0.05)
    return thread


def test_a_save_holds_the_state_of_its_step(tmp_path, gate):
    store = CheckpointStore(tmp_path, background=True)
    live = make_state(1.0)
    start(store, 1, live)
    step = waiting(store.wait_staged)  # the optimiser step
    assert gate.copied.wait(20) and step.is_alive()
    gate.copy.set()
    step.join(20)
    assert not step.is_alive()
    live["model"]["layers.0.weight"].zero_()  # while it is being written
    assert gate.writing.wait(20) and names(store) == [".step_00000001"]
    gate.write.set()
    path = store.finish()
    assert same(load(store, path), make_state(1.0))


def test_one_save_is_in_flight_and_the_next_waits(tmp_path, gate):
    store = CheckpointStore(tmp_path, background=True)
    gate.copy.set()
    start(store, 1, make_state(1.0))
    assert gate.writing.wait(20)
    next_save = waiting(lambda: start(store, 2, make_state(2.0)))
    settled = waiting(store.settle)
    assert next_save.is_alive() and settled.is_alive()
    gate.write.set()
    next_save.join(20)
    assert store.finish() == tmp_path / "step_00000002"
    assert names(store) == ["latest", "step_00000001", "step_00000002"]


def test_the_copies_use_the_same_memory_again(tmp_path):
    buffers = HostBuffers()
    first = buffers.copy(make_state(1.0))
    pointers = [x.data_ptr() for x in first["model"].values()]
    second = buffers.copy(make_state(2.0))
    assert same(second, make_state(2.0))
    assert [x.data_ptr() for x in second["model"].values()] == pointers
    grown = buffers.copy(make_state(3.0, rows=9))
    assert same(grown, make_state(3.0, rows=9))


@BOTH
def test_a_fault_while_writing_ends_the_save_alone(tmp_path, caplog, background):
    store = CheckpointStore(tmp_path, background=background)
    assert store.finish() is None  # nothing asked for, nothing missing
    save(store, 1)
    big = make_state(2.0, rows=20_000)
    with files_up_to(100_000):
        assert save(store, 2, big) is None
    file = tmp_path / ".step_00000002" / "__0_0.distcp"
    line = f"step 2 is not saved: {file}: File too large"
    assert warnings(caplog) == [line]
    assert names(store) == ["latest", "step_00000001"]
    with pytest.raises(TrainingError, match=r"step 2 is not saved: .*File too large"):
        store.finish()
    assert save(store, 3, big) == store.finish() == tmp_path / "step_00000003"


@BOTH
@pytest.mark.parametrize("phase", ["reserve", "seal", "publish", "point"])
def test_a_full_disk_at_any_phase_ends_the_save_alone(
    tmp_path, caplog, monkeypatch, background, phase
):
    store = CheckpointStore(tmp_path, keep=Keep(newest=1), background=background)
    save(store, 1)

    def full(*args, **facts):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, phase, full)
        assert save(store, 2) is None
    line = "step 2 is not saved: /checkpoints/file: No space left on device"
    assert warnings(caplog) == [line]
    left = ["latest", "step_00000001"] + ["step_00000002"] * (phase == "point")
    assert names(store) == left
    assert store.resolve("auto").name == left[-1]
    save(store, 3)
    assert names(store) == ["latest", "step_00000003"]


@BOTH
def test_a_save_that_cannot_fit_is_not_begun(tmp_path, caplog, monkeypatch, background):
    store = CheckpointStore(tmp_path, background=background)
    save(store, 1)
    free = SimpleNamespace(free=2**20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        assert save(store, 2, make_state(2.0, rows=2**17)) is None
        assert save(store, 3) is not None
    assert warnings(caplog) == [f"step 2 is not saved: {tmp_path}: 0.00 GiB needed, 0.00 free"]
    assert names(store) == ["latest", "step_00000001", "step_00000003"]


@BOTH
def test_a_draft_that_is_not_seen_is_not_made(tmp_path, caplog, monkeypatch, background):
    """As on a node whose folder is another."""
    monkeypatch.setattr(CheckpointFolder, "reserve", lambda *args: None)
    store = CheckpointStore(tmp_path, background=background)
    assert save(store, 1) is None
    file = tmp_path / ".step_00000001" / "__0_0.distcp"
    assert warnings(caplog) == [f"step 1 is not saved: {file}: No such file or directory"]
    assert names(store) == []


def test_a_checkpoint_counts_though_older_ones_cannot_be_removed(tmp_path, caplog, monkeypatch):
    store = CheckpointStore(tmp_path, keep=Keep(newest=1))
    save(store, 1)

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "step_00000001")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "prune", refuse)
        assert save(store, 2) == store.finish()
    assert warnings(caplog) == ["older checkpoints stay: step_00000001: Permission denied"]
    save(store, 3)
    assert names(store) == ["latest", "step_00000003"]


@BOTH
def test_what_is_no_fault_of_the_disk_ends_the_run(tmp_path, monkeypatch, background):
    store = CheckpointStore(tmp_path, background=background)
    save(store, 1)

    def broken(*args):
        raise ValueError("a mistake")

    monkeypatch.setattr(saving, "write_side_files", broken)
    told = pytest.raises(RuntimeError, match=r"rank 0: ValueError\('a mistake'\)")
    with contextlib.nullcontext() if background else told:
        start(store, 2, make_state(2.0))
    store.settle()
    for touch in (store.drain, store.finish, lambda: start(store, 3, make_state(3.0))):
        with pytest.raises(RuntimeError, match="a mistake"):
            touch()
    assert names(store) == ["latest", "step_00000001"]


def test_copies_that_fail_let_the_run_go_on_to_say_so(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, background=True)

    def no_memory(*args):
        raise torch.OutOfMemoryError("no memory to pin")

    monkeypatch.setattr(HostBuffers, "copy", no_memory)
    start(store, 1, make_state(1.0))
    store.wait_staged()
    with pytest.raises(RuntimeError, match="no memory to pin"):
        store.finish()
