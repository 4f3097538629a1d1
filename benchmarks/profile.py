"""Where a step goes, by part of the model.

Hooks open a profiler range around the forward of every module that stands for a part. An
operation of the forward belongs to the innermost range around it. One of the backward belongs to
the part of the forward operation that made its node of the graph: both carry the node's number.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from benchmarks.measure import timed
from models.ffn import SwiGLU
from models.hybrid import HybridLM
from models.mixer import Mixer
from models.moe import MoE, Router
from models.norm import RMSNorm
from models.sequence import CausalConv, LatentAttention, LinearRecurrence, SoftmaxAttention
from trainer.loss import LanguageModelLoss

# The first class that fits; what none fits belongs to the module around it.
PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (LinearRecurrence, "recurrence core"),
    (CausalConv, "convolution"),
    (SoftmaxAttention, "softmax attention"),
    (LatentAttention, "latent up-projection"),
    (Mixer, "gates and the rest of mixers"),
    (RMSNorm, "norms"),
    (Router, "router"),
    (MoE, "experts"),
    (SwiGLU, "dense feed-forward"),
    (HybridLM, "embedding and residuals"),
    (LanguageModelLoss, "head and loss"),
)
PROJECTIONS = "projections of mixers"
OPTIMISER = "optimiser"
REST = "gradients' accumulation, Python"

_RANGE = "part: "
_BACKWARD = "autograd::engine::evaluate_function"
_OPTIMISER = "Optimizer.step"  # a range that torch's optimisers open themselves

Parts = dict[str, dict[str, float]]  # part -> seconds in its "forward" and its "backward"


def profile(step: Callable[[], object], module: nn.Module, *, device: torch.device) -> Parts:
    """One step of `module` with its optimiser, largest part first.

    The parts add up to the step: what is in none of them is the last one, as "forward". On CUDA
    the times are those of the kernels, and the last part the time in which none of them ran.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _ranges(module), profiler(activities=activities) as recorded:
        total = timed(step, device)
    parts = attribute(list(recorded.events()), on_device=device.type == "cuda")
    known = sum(sum(part.values()) for part in parts.values())
    ordered = dict(sorted(parts.items(), key=lambda item: -sum(item[1].values())))
    return ordered | {REST: {"forward": max(total - known, 0.0), "backward": 0.0}}


def attribute(events: list[FunctionEvent], *, on_device: bool) -> Parts:
    """Profiler events of one step -> seconds by part."""
    parts: Parts = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    owner: dict[int, str] = {}  # number of a node -> part; the last operation to bear it made it
    backward = []
    on_host = (event for event in events if event.device_type == DeviceType.CPU)
    for event in sorted(on_host, key=lambda event: event.time_range.start):
        if event.name.startswith(_BACKWARD):
            if event.cpu_parent is None:  # else it is part of one that is
                backward.append(event)
            continue
        part = _innermost(event)
        if part is None:
            continue
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        parts[part]["forward"] += spent / 1e6
        if event.sequence_nr >= 0:
            owner[event.sequence_nr] = part
    for event in backward:
        if event.sequence_nr in owner:
            spent = event.device_time_total if on_device else event.cpu_time_total
            parts[owner[event.sequence_nr]]["backward"] += spent / 1e6
    return dict(parts)


def _innermost(event: FunctionEvent) -> str | None:
    """The part around an event; None outside all of them, and inside the backward."""
    around: FunctionEvent | None = event
    while around is not None and not around.name.startswith((_RANGE, _BACKWARD, _OPTIMISER)):
        around = around.cpu_parent
    if around is None or around.name.startswith(_BACKWARD):
        return None
    return OPTIMISER if around.name.startswith(_OPTIMISER) else around.name.removeprefix(_RANGE)


@contextmanager
def _ranges(module: nn.Module) -> Iterator[None]:
    """Opens a profiler range around every forward of the parts of `module`."""
    parts = _parts(module)
    for inner, part in parts.items():
        inner.forward = _within(part, inner.forward)
    try:
        yield
    finally:
        for inner in parts:
            del inner.forward


def _within(part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE + part):
            return forward(*args, **kwargs)

    return ranged


def _parts(module: nn.Module) -> dict[nn.Module, str]:
    """Part by module, for those that stand for one."""
    parts = {}
    for inner in module.modules():
        named = (name for kind, name in PARTS if isinstance(inner, kind))
        if (part := next(named, None)) is not None:
            parts[inner] = part
        if isinstance(inner, Mixer):
            parts |= {m: PROJECTIONS for m in inner.modules() if isinstance(m, nn.Linear)}
    return parts
