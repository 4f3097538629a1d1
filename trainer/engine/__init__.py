"""What the training loop needs of an engine, and how it is done in a single process.

An engine owns the module, the optimiser and how gradients are reduced. It hands out its state under
the model's own names, whole and in fp32 or wider, so that a run may go on with another engine.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from parallel.collectives import sum_over_ranks
from parallel.mesh import Mesh
from trainer.settings import Numerics

State = dict[str, dict[str, Any]]  # "model" and "optimizer": name -> tensor

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Model(Protocol):
    """What an engine sees of the model, e.g. a `HybridLM`, beside its being a module."""

    layers: Sequence[nn.Module]  # whose parameters nothing reads outside their own forward

    def units(self) -> list[nn.Module]: ...


class TokenScores(NamedTuple):
    """Of each label when all tokens before it are given; where it is ignored, 0 and False."""

    loss: Tensor  # [batch, seq] nats, in fp32 or wider
    hit: Tensor  # [batch, seq] bool: the label is the likeliest token


class LossModule(nn.Module):
    """Called with a batch, it returns the sum of its token losses; with `scores=True` too, the
    `TokenScores`."""

    model: Any  # a module and a `Model`, whose names are those of a checkpoint
    beside: Sequence[Any] = ()  # other models that see the batch, which no engine trains

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[str, Tensor] = {}

    def flops_per_token(self, model: Any, context: float) -> float:
        """Of a token that sees `context` tokens, forward and backward; model: as this one, with all
        shapes, which an engine may have changed."""
        return 3 * model.flops_per_token(context)

    def take_sums(self) -> dict[str, Tensor]:
        """Of what the loss is made of, over the tokens of the batches since the last call."""
        sums, self._sums = self._sums, {}
        return sums

    def _count(self, **sums: Tensor) -> None:
        for name, x in sums.items():
            self._sums[name] = self._sums.get(name, 0) + x.detach().double()


class Memory(NamedTuple):
    """Bytes that a rank keeps from step to step."""

    parameters: int
    gradients: int
    optimizer: int

    @classmethod
    def of_adamw(cls, held: Iterable[Tensor]) -> "Memory":
        """Of parameters that a rank holds: gradients and each of two moments take what the trained
        ones do."""
        sizes = [(parameter.nbytes, parameter.requires_grad) for parameter in held]
        trained = sum(size for size, wanted in sizes if wanted)
        return cls(sum(size for size, _ in sizes), trained, 2 * trained)


class Engine:
    """A single process; the base of the others.

    loss: its model is on the meta device, and `initialise` gives each of its units memory and
    initial values, for which every rank calls it in the same order: they are drawn at random.
    optimizer: makes one for the parameters of the module that it is given.
    """

    gradient_factor: float = 1.0  # undoes the engine's averaging: gradients are sums over ranks
    compiles: bool = True  # whether layers may be compiled

    def __init__(
        self,
        *,
        loss: LossModule,
        initialise: Callable[[nn.Module], None],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        mesh: Mesh,
        numerics: Numerics,
    ) -> None:
        self.loss, self.model, self.mesh, self.numerics = loss, loss.model, mesh, numerics
        self._materialise(initialise)
        self.optimizer = optimizer(self.model)

    def _materialise(self, initialise: Callable[[nn.Module], None]) -> None:
        for unit in self.model.units():
            initialise(unit)

    def accumulate(self, batch: Any, scale: float, *, last: bool) -> Tensor:
        """Adds the gradients of `scale` x the loss of a micro-batch; -> its detached loss sum.

        Gradients are those of the whole step, on all ranks, behind its last micro-batch.
        """
        loss = self.loss(batch)
        (loss * (scale * self.gradient_factor)).backward()
        return loss.detach()

    def evaluate(self, batch: Any) -> TokenScores:
        """Of this rank's batch."""
        self.loss.eval()
        with torch.no_grad():
            scores = self.loss(batch, scores=True)
        self.loss.train()
        return scores

    def clip_grad_norm(self, max_norm: float) -> float:
        """-> the norm of all gradients before they are scaled down to `max_norm`."""
        return clip([p.grad for p in self.model.parameters() if p.grad is not None], max_norm)

    def step(self, lr: float) -> None:
        """Updates the parameters with this learning rate and drops the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def drop(self) -> None:
        """Takes the place of `step` where a step is not to be taken: drops the gradients of its
        micro-batches; parameters and optimiser stay as they are, to the bit.

        They may not be finite, and `clip_grad_norm` may have been called.
        """
        self.optimizer.zero_grad()

    def memory(self) -> Memory:
        """What this rank keeps."""
        return Memory.of_adamw(self.model.parameters())

    def assign(self, name: str, value: Tensor) -> None:
        """Gives a parameter or buffer of the model its value, whole and the same on all ranks."""
        self.model.state_dict()[name].copy_(value)

    def state(self) -> State:
        """What this rank has to save: live tensors, or copies where the engine keeps them in
        another form. A plain tensor is alike on all ranks that have it, which may be one alone.

        Collective. Hyperparameters stay out: they are the configuration's, also on resuming.
        """
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)
        tensors = {name: x for name, x in optimizer.items() if name.startswith("state.")}
        return {"model": get_model_state_dict(self.model), "optimizer": tensors}

    def load(self, fill: Callable[[State], None]) -> None:
        """Collective; `fill` reads what is saved under the names that it is given into the tensors
        that it is given, on each rank by itself."""
        state = self.state()
        fill(state)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)
        optimizer.update(state["optimizer"])
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=_FLAT)


def clip(grads: list[Tensor], max_norm: float, group: dist.ProcessGroup | None = None) -> float:
    """Scales gradients, in place, to a norm of at most `max_norm`; -> their norm before.

    grads: what this rank holds of them; group: the ranks among which they are divided. Squares add
    up in fp64: in fp32 the rounding of 10 million of them, 2e-6, would depend on who holds which.
    """
    square = torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square().sum()
    norm = math.sqrt(sum_over_ranks(square, group))
    share = max_norm / (norm + 1e-6)  # the term is torch's
    if share < 1:
        torch._foreach_mul_(grads, share)
    return norm


class _Probe(nn.Module):
    """One parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList()

    def units(self) -> list[nn.Module]:
        return [self]


class _ProbeLoss(LossModule):
    """The gradient of the parameter is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Probe()

    def forward(self, x: Tensor) -> Tensor:
        return (self.model.weight * x).sum()


def verify_gradient_factor(engine: Callable[..., Engine], mesh: Mesh) -> None:
    """Holds the engine to its factor on the live groups: gradients must be sums over ranks.

    A wrong factor is silent otherwise: Adam hides it, and only clipping shows it. Raises
    RuntimeError.
    """
    wrapped = engine(
        loss=_ProbeLoss().to(mesh.device),
        initialise=lambda unit: None,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.0),
        mesh=mesh,
    )
    x = torch.tensor(float(mesh.rank + 1), device=mesh.device)
    for last in (False, True):
        wrapped.accumulate(x, 1.0, last=last)
    got = wrapped.clip_grad_norm(math.inf)
    expected = 2 * float(sum_over_ranks(x.clone(), mesh.group))
    if not math.isclose(got, expected, rel_tol=1e-5):
        raise RuntimeError(
            f"{type(wrapped).__name__} reduces a gradient of {expected} to {got}: "
            f"its factor {wrapped.gradient_factor} is wrong on {mesh.ranks} ranks"
        )
