"""A small state of training, as an engine gives it."""

import contextlib
import random
import resource

import numpy as np
import torch

from trainer.engine import State


def make_state(value: float, rows: int = 6) -> State:
    weight = torch.arange(rows * 4.0).view(rows, 4) + value
    return {
        "model": {"layers.0.weight": weight, "router.bias": torch.tensor([value, 2.0])},
        "optimizer": {
            "state.layers.0.weight.exp_avg": weight * 0.1,
            "state.layers.0.weight.step": torch.tensor(value),
        },
    }


def same(a: State, b: State) -> bool:
    flat = [{(s, n): v for s, values in x.items() for n, v in values.items()} for x in (a, b)]
    return flat[0].keys() == flat[1].keys() and all(
        torch.equal(v, flat[1][k]) for k, v in flat[0].items()
    )


def draw() -> list[float]:
    """One number of each random generator."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def save(store, step, state=None, **facts):
    """The checkpoint of a step, its state that number unless another is given; None if given up."""
    state = make_state(float(step)) if state is None else state
    store.save(step, state, progress={"step": step}, config="model: {}\n", **facts)
    return store.drain()


def load(store, path, rows: int = 6) -> State:
    state = make_state(0.0, rows)
    reader = store.reader(path)
    reader.check(state)
    reader.fill(state)
    return state


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def flip(path):
    """Turns one bit around, in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@contextlib.contextmanager
def files_up_to(size: int):
    """Longer ones cannot be written: a fault that the system itself gives, also to root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]
