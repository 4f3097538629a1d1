"""Run by torchrun on two ranks: see test_two_ranks.py. Writes what it saw to a file per rank."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.trainer.checkpoint.states import draw, make_state, same
from trainer.checkpoint.store import CheckpointStore
from trainer.errors import ConfigError


def shard(state):
    """The weight and its average in rows, unevenly: 5 over 2 ranks."""
    mesh = init_device_mesh("cpu", (2,))
    for values in state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                values[name] = distribute_tensor(value, mesh, [Shard(0)])
    return state


def gather(state):
    return {
        section: {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in values.items()
        }
        for section, values in state.items()
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.manual_seed(rank)
    store = CheckpointStore(folder / "checkpoints", keep=0)
    seen = {}

    store.save(1, make_state(1.0, rows=5), progress={"rank": 0}, config="")
    path = store.save(2, shard(make_state(2.0, rows=5)), progress={"rank": 0}, config="")
    after = draw()
    state = shard(make_state(0.0, rows=5))
    store.load(path, state)
    seen["resharded"] = same(gather(state), make_state(2.0, rows=5))
    seen["generators"] = draw() == after
    seen["draws"] = after

    try:
        store.save(3, make_state(3.0), progress={"bad": object() if rank == 0 else 0}, config="")
    except RuntimeError as error:
        seen["vote"] = str(error)
    try:
        other = make_state(0.0, rows=5 + rank)  # only rank 1 has another model
        store.load(path, other)
    except ConfigError as error:
        seen["mismatch"] = str(error)
    seen["resolved"] = str(store.resolve("auto"))
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
