"""The store on two ranks, in one launch; then one process reads what they wrote."""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.parallel.ranks import on_ranks
from tests.trainer.checkpoint.states import draw, files_up_to, flip, load, make_state, same, save
from trainer.checkpoint import manifest
from trainer.checkpoint.shards import assign
from trainer.checkpoint.store import CheckpointStore
from trainer.errors import ConfigError, TrainingError


def shard(state, mesh):
    """The weight and its average in rows."""
    return {
        section: {
            name: distribute_tensor(x, mesh, [Shard(0)]) if x.dim() == 2 else x
            for name, x in values.items()
        }
        for section, values in state.items()
    }


def whole(state):
    return {
        section: {
            name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in values.items()
        }
        for section, values in state.items()
    }


def held_by(rank, state):
    """As ZeRO keeps it: weights on all ranks, of the optimiser each name on one rank alone."""
    names = sorted(state["optimizer"])
    return {
        "model": state["model"],
        "optimizer": {name: state["optimizer"][name] for name in names[rank::2]},
    }


def saves_and_loads(axis, folder):
    group, mesh = dist.new_group(backend="gloo"), init_device_mesh("cpu", (2,))
    torch.manual_seed(axis.rank)
    step = 0
    for background in (False, True):
        store = CheckpointStore(folder, group=group, background=background)
        for rows in (5, 1):  # uneven, and with nothing on the second rank
            step += 1
            live = shard(make_state(step, rows), mesh)
            store.save(step, live, progress={"step": step}, config="")
            store.wait_staged()
            after = draw()
            if background:
                live["model"]["layers.0.weight"].zero_()
            path = store.finish()
            reader, state = store.reader(path), shard(make_state(0.0, rows), mesh)
            reader.check(state)
            reader.fill(state)
            assert same(whole(state), make_state(step, rows))
            reader.restore_generators()
            assert draw() == after
    (folder / f"draws{axis.rank}").write_text(json.dumps(after[2]))
    store = CheckpointStore(folder, group=group)
    path = save(store, step + 1, held_by(axis.rank, make_state(step + 1)))
    state = held_by(1 - axis.rank, make_state(0.0))
    reader = store.reader(path)
    reader.check(state)
    reader.fill(state)
    assert same(state, held_by(1 - axis.rank, make_state(step + 1)))
    with pytest.raises(ConfigError, match=r"another optimizer: 1 unexpected \(state.layers.0"):
        reader.check(held_by(0, make_state(0.0)))  # half of it on no rank
    with pytest.raises(ConfigError, match=r"layers.0.weight is \[6, 4\], not \[7, 4\]"):
        reader.check(make_state(0.0, rows=6 + axis.rank))  # on the second rank alone


def what_all_hold_is_written_once(axis, folder):
    store = CheckpointStore(folder, group=dist.new_group(backend="gloo"), background=True)
    copied = []
    copy = store._buffers.copy
    store._buffers.copy = lambda state: copied.append(state) or copy(state)
    for step in (1, 2):
        save(store, step, make_state(float(step), rows=5000))
    names = [name for values in copied[-1].values() for name in values]
    everywhere = [None, None]
    dist.all_gather_object(everywhere, names)
    assert len(set(everywhere[0] + everywhere[1])) == 4 == len(everywhere[0] + everywhere[1])
    sizes = [path.stat().st_size for path in (folder / "step_00000002").glob("*.distcp")]
    assert len(sizes) == 2 and min(sizes) > 80_000 and sum(sizes) < 170_000


def faults_of_one_rank(axis, folder):
    store = CheckpointStore(folder, group=dist.new_group(backend="gloo"), background=True)
    first = save(store, 1)
    limit = files_up_to(50_000) if axis.rank == 1 else contextlib.nullcontext()
    with limit:
        assert save(store, 2, make_state(2.0, rows=20_000)) is None
    with pytest.raises(TrainingError, match=r"step_00000002/__1_0.distcp: File too large"):
        store.finish()
    assert store.resolve("auto") == first
    second = save(store, 3)
    dist.barrier()
    if axis.rank == 0:
        flip(second / "__1_0.distcp")
    dist.barrier()
    with pytest.raises(ConfigError, match=r"__1_0.distcp is damaged"):
        store.resolve(str(second))
    assert store.resolve("auto") == first
    read = []
    fingerprint = manifest.fingerprint
    manifest.fingerprint = lambda path: read.append(path.name) or fingerprint(path)
    store.resolve(str(first))
    everywhere = [None, None]
    dist.all_gather_object(everywhere, read)
    files = manifest.read_manifest(first)["files"]
    assert sorted(everywhere[0] + everywhere[1]) == sorted(files)
    assert max(map(len, everywhere)) - min(map(len, everywhere)) <= 1


def all_of_it(axis, folder):
    for check in (saves_and_loads, what_all_hold_is_written_once, faults_of_one_rank):
        check(axis, folder / check.__name__)
        dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("saves_and_loads", "what_all_hold_is_written_once", "faults_of_one_rank"):
        (folder / name).mkdir()
    on_ranks(2, all_of_it, folder)
    return folder / "saves_and_loads"


def test_each_rank_has_its_own_generators(folder):
    assert (folder / "draws0").read_text() != (folder / "draws1").read_text()


@pytest.mark.parametrize(("step", "rows"), [(1, 5), (2, 1), (3, 5), (4, 1), (5, 6)])
def test_one_process_reads_whatever_was_written(folder, step, rows):
    store = CheckpointStore(folder)
    assert store.resolve("auto").name == "step_00000005"
    state = load(store, folder / f"step_{step:08}", rows)
    assert same(state, make_state(float(step), rows))


def test_work_is_dealt_out_evenly_among_those_who_can_do_it():
    shared = {("model", str(i)): 10 - i for i in range(10)}
    writers = assign([shared, shared, shared | {("optimizer", "own"): 12}])
    assert writers["optimizer", "own"] == 2
    loads = [sum(shared.get(key, 12) for key, w in writers.items() if w == r) for r in range(3)]
    assert sum(loads) == 55 + 12 and max(loads) - min(loads) <= 2
