"""A part of suite=attention on one rank: time, memory, bytes and errors, of the worst rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.job import Job, Result
from benchmarks.measure import measure
from benchmarks.parts import Draw, Shared, build_part
from benchmarks.settings import Mask, Part, Scheme
from models.sequence import Fragment
from parallel.collectives import barrier, gather_objects, sum_over_ranks
from parallel.context import AttentionScheme, apply_context_parallel, build_schemes
from parallel.layout import Strategy, TokenLayout, plan_layout
from parallel.mesh import Mesh, join, leave


@dataclass(frozen=True, kw_only=True)
class Case:
    """What ranks share, and how."""

    part: Part
    mask: Mask
    documents: Sequence[int]  # lengths
    reference: str  # a file that one rank writes in fp64, and others compare with
    scheme: Scheme | None = None  # None: one rank
    layout: Strategy = "contiguous"
    ulysses: int = 1


def measure_case(job: Job) -> Result:
    """What `measure` gives, comm_bytes of a step, error (the largest of a difference from the
    reference over the largest entry, of output and all gradients), imbalance of softmax area.

    The same on all ranks. In fp64 it only writes the reference.
    """
    assert job.case is not None and job.config is not None
    case = Case(**job.case)
    mesh = join(cp=None, ulysses=case.ulysses)
    layout = case_layout(case, mesh.context_ranks)
    index = torch.from_numpy(layout.index(mesh.rank))
    draw = Draw(index, seed=job.seed, precision=job.dtype, device=job.device)
    info = layout.info(mesh.rank, mesh.device)
    part = build_part(case.part, job.config, info, draw, case.mask)
    share(part, case, mesh)
    step = Step(part, index >= 0, autocast=draw.numerics.autocast)
    if job.dtype == "fp64":
        torch.save(step.results(mesh), case.reference)
        return {}

    def together() -> Tensor:
        """Takes as long as the slowest rank."""
        loss = step()
        barrier(mesh.group)
        return loss

    result = measure(together, repeats=job.repeats, device=mesh.device)
    if mesh.context is not None:
        mesh.context.traffic.take()
    results = step.results(mesh)
    received = {} if mesh.context is None else mesh.context.traffic.take()
    result["comm_bytes"] = sum(received.values())
    result["error"] = error(results, torch.load(case.reference, mmap=True), index[index >= 0])
    worst = _worst(gather_objects(result, mesh.group))
    leave(mesh)
    return worst | {"imbalance": layout.report(causal=case.mask == "causal").imbalance}


def case_layout(case: Case, ranks: int) -> TokenLayout:
    starts = accumulate(case.documents, initial=0)
    documents = [
        Fragment(length, start) for length, start in zip(case.documents, starts, strict=False)
    ]
    return plan_layout(documents, ranks=ranks, strategy=case.layout)


def share(part: Shared, case: Case, mesh: Mesh) -> None:
    """Puts the scheme into the part."""
    if mesh.context is None or mesh.ulysses is None or mesh.ring is None:
        return
    assert case.scheme is not None
    attention: AttentionScheme = "ring" if case.scheme == "state_passing" else case.scheme
    schemes = build_schemes(
        context=mesh.context,
        ulysses=mesh.ulysses,
        ring=mesh.ring,
        softmax=attention,
        latent=attention,
        recurrence="ulysses" if case.scheme == "ulysses" else "state_passing",
        scan_ranks=32,
        outer="ring",
    )
    apply_context_parallel(part.module, schemes)


class Step:
    """Forward and backward, from the output itself as its gradient; padding takes no part."""

    def __init__(self, part: Shared, valid: Tensor, *, autocast: torch.dtype | None) -> None:
        self.part, self.valid, self.autocast = part, valid, autocast

    def __call__(self) -> Tensor:
        return self._run().float().square().mean()

    def results(self, mesh: Mesh) -> dict[str, list[Tensor]]:
        """tokens: [valid, ...] of the output and of the gradients of inputs; weights: gradients,
        summed over ranks."""
        output = self._run()
        grads = [x.grad for x in self.part.tokens]
        tokens = [x[0, self.valid] for x in (output, *grads) if x is not None]
        weights = [x.grad for x in self.part.weights]
        summed = [sum_over_ranks(x, mesh.group) for x in weights if x is not None]
        return {"tokens": tokens, "weights": summed}

    def _run(self) -> Tensor:
        for leaf in self.part.leaves:
            leaf.grad = None
        device = self.part.tokens[0].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            output = self.part.run()
        grad = output.detach().clone()
        grad[:, ~self.valid] = 0
        output.backward(grad)
        return output.detach()


def error(
    results: dict[str, list[Tensor]], reference: dict[str, list[Tensor]], index: Tensor
) -> float:
    """index: where the tokens are in the reference."""
    pairs = [
        *((x, y, y[index]) for x, y in zip(results["tokens"], reference["tokens"], strict=True)),
        *((x, y, y) for x, y in zip(results["weights"], reference["weights"], strict=True)),
    ]
    return max(
        float((x.cpu().double() - own).abs().amax() / whole.abs().amax())
        for x, whole, own in pairs
        if x.numel()
    )


def _worst(ranks: list[Result]) -> Result:
    """The largest figure of any rank; what others used of the machine excludes all ranks."""
    worst = {key: max(result[key] for result in ranks) for key in ranks[0]}
    machine = ranks[0]["other_cores"] + ranks[0]["own_cores"]
    others = machine - sum(result["own_cores"] for result in ranks)
    return worst | {"other_cores": max(others, 0.0)}
