"""The store on two ranks, in one launch; then one process reads what they wrote."""

import json

import pytest

from tests.launch import torchrun
from tests.trainer.checkpoint.states import make_state, same
from trainer.checkpoint.store import CheckpointStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    run = torchrun(2, "-m", "tests.trainer.checkpoint.two_ranks", str(folder))
    assert all((folder / f"rank{rank}.json").exists() for rank in range(2)), run.stderr
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_sharded_state_and_each_ranks_generators_come_back(seen):
    assert all(rank["resharded"] and rank["generators"] for rank in seen)
    assert seen[0]["draws"][2] != seen[1]["draws"][2]


def test_a_failure_of_one_rank_is_raised_on_all(seen):
    for rank in seen:
        assert rank["vote"].startswith("rank 0: TypeError")
        assert "layers.0.weight is [5, 4], not [6, 4]" in rank["mismatch"]
        assert rank["resolved"].endswith("step_00000002")


@pytest.mark.parametrize("step", [1, 2])
def test_one_process_reads_replicated_and_sharded_state(folder, step):
    store = CheckpointStore(folder / "checkpoints", keep=0)
    state = make_state(0.0, rows=5)
    store.load(folder / "checkpoints" / f"step_{step:08}", state)
    assert same(state, make_state(float(step), rows=5))
