"""A small state of training, as torch.distributed.checkpoint.state_dict gives it."""

import random
from typing import Any

import numpy as np
import torch


def make_state(value: float, rows: int = 6) -> dict[str, dict[str, Any]]:
    weight = torch.arange(rows * 4.0).view(rows, 4) + value
    return {
        "model": {"layers.0.weight": weight, "router.bias": torch.tensor([value, 2.0])},
        "optimizer": {
            "state.layers.0.weight.exp_avg": weight * 0.1,
            "state.layers.0.weight.step": torch.tensor(value),
            "param_groups.layers.0.weight.lr": value,
            "param_groups.layers.0.weight.betas": (0.9, value),
            "param_groups.layers.0.weight.foreach": None,
        },
    }


def same(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> bool:
    flat = [{(s, n): v for s, values in x.items() for n, v in values.items()} for x in (a, b)]
    return flat[0].keys() == flat[1].keys() and all(
        torch.equal(v, flat[1][k]) if isinstance(v, torch.Tensor) else v == flat[1][k]
        for k, v in flat[0].items()
    )


def draw() -> list[float]:
    """One number of each random generator."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]
