"""The state of a model that ranks share by DeepSpeed, under the model's own names.

Tensors are made whole one by one, and the whole of each stays in the host memory of one rank, its
owner, so that no rank ever needs memory for all of them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.collectives import spread
from parallel.mesh import Mesh
from trainer.engine import State
from trainer.engine.partitions import Partitions


class _Entry(NamedTuple):
    """What is saved under a name: a parameter or buffer, or the optimiser's `key` of one."""

    section: str
    name: str
    tensor: Tensor
    key: str | None
    owner: int


class OwnedState:
    """All its methods are collective."""

    def __init__(self, model: nn.Module, partitions: Partitions, mesh: Mesh) -> None:
        self._model, self._partitions, self._mesh = model, partitions, mesh

    def gather(self) -> State:
        """Live tensors where every rank keeps them whole; else copies, on their owners."""
        state: State = {"model": {}, "optimizer": {}}
        for section, name, tensor, key, owner in self._entries():
            value, everywhere = tensor, True
            if isinstance(tensor, nn.Parameter):
                value, everywhere = self._partitions.read(tensor, key)
            if everywhere:
                state[section][name] = value
            elif owner == self._mesh.rank:
                state[section][name] = value.cpu()
        return state

    def load(self, fill: Callable[[State], None]) -> None:
        """Every rank fills what it owns, in one call, and hands it on."""
        state: State = {"model": {}, "optimizer": {}}
        for section, name, tensor, key, owner in self._entries():
            if owner == self._mesh.rank:
                state[section][name] = self._empty(tensor, key, "cpu")
        fill(state)
        for section, name, tensor, key, owner in self._entries():
            value = state[section].pop(name, None)
            if value is None:
                value = self._empty(tensor, key, tensor.device)
            value = value.to(tensor.device)
            self._write(tensor, spread(value, owner, self._mesh.group), key)

    def assign(self, name: str, value: Tensor) -> None:
        """value: the same on all ranks, on any device, of any dtype."""
        tensor = self._model.state_dict(keep_vars=True)[name]
        dtype = torch.float32 if isinstance(tensor, nn.Parameter) else tensor.dtype
        self._write(tensor, value.to(tensor.device, dtype), None)

    def _write(self, tensor: Tensor, value: Tensor, key: str | None) -> None:
        if isinstance(tensor, nn.Parameter):
            self._partitions.write(tensor, value, key)
        else:
            tensor.copy_(value)

    def _empty(self, tensor: Tensor, key: str | None, device: torch.device | str) -> Tensor:
        """Room for the whole; parameters are saved in fp32."""
        dtype = torch.float32 if isinstance(tensor, nn.Parameter) else tensor.dtype
        return torch.empty(self._partitions.shape(tensor, key), dtype=dtype, device=device)

    def _entries(self) -> Iterator[_Entry]:
        """In the same order on all ranks."""
        tensors = self._model.state_dict(keep_vars=True)
        sizes = {name: self._partitions.shape(x).numel() for name, x in tensors.items()}
        owners = _owners(sizes, self._mesh.ranks)
        for name, tensor in tensors.items():
            yield _Entry("model", name, tensor, None, owners[name])
            trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            for key in self._partitions.keys if trained else ():
                yield _Entry("optimizer", f"state.{name}.{key}", tensor, key, owners[name])


def _owners(sizes: dict[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank: largest first, each to the rank that has least yet."""
    loads = [0] * ranks
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners
