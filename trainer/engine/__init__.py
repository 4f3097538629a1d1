"""What the training loop needs of an engine, and how it is done in a single process.

An engine owns the module, the optimiser and how gradients are reduced. It hands out its state under
the model's own names, whole and in fp32 or wider, so that a run may go on with another engine.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
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

State = dict[str, dict[str, Any]]  # "model" and "optimizer": name -> tensor

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Engine:
    """A single process; the base of the others.

    loss: the module that is called with a batch and returns the sum of its token losses;
    model: the part of it whose names are those of a checkpoint.
    """

    gradient_factor: float = 1.0  # undoes the engine's averaging: gradients are sums over ranks

    def __init__(
        self, *, loss: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh
    ) -> None:
        self.loss, self.model, self.optimizer, self.mesh = loss, model, optimizer, mesh

    def accumulate(self, batch: Any, scale: float, *, last: bool) -> Tensor:
        """Adds the gradients of `scale` x the loss of a micro-batch; -> its detached loss sum.

        Ranks communicate, if at all, in the last micro-batch of a step only.
        """
        loss = self.loss(batch)
        (loss * (scale * self.gradient_factor)).backward()
        return loss.detach()

    def evaluate(self, batch: Any) -> Tensor:
        """-> the loss sum of this rank's batch."""
        self.loss.eval()
        with torch.no_grad():
            loss = self.loss(batch)
        self.loss.train()
        return loss

    def clip_grad_norm(self, max_norm: float) -> float:
        """-> the norm of all gradients before they are scaled down to `max_norm`."""
        return float(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

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

    def state(self) -> State:
        """Live tensors where the engine keeps them whole: what fills them has loaded them.

        Hyperparameters stay out: they are the configuration's, also when a run is resumed.
        """
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)
        tensors = {name: x for name, x in optimizer.items() if name.startswith("state.")}
        return {"model": get_model_state_dict(self.model), "optimizer": tensors}

    def load_state(self, state: State) -> None:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_FLAT)
        optimizer.update(state["optimizer"])
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=_FLAT)


class _Probe(nn.Module):
    """One parameter, whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def verify_gradient_factor(engine: Callable[..., Engine], mesh: Mesh) -> None:
    """Holds the engine to its factor on the live groups: gradients must be sums over ranks.

    A wrong factor is silent otherwise: Adam hides it, and only clipping shows it. Raises
    RuntimeError.
    """
    probe = _Probe().to(mesh.device)
    sgd = torch.optim.SGD(probe.parameters(), lr=0.0)
    wrapped = engine(loss=probe, model=probe, optimizer=sgd, mesh=mesh)
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
