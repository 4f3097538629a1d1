"""What autograd keeps of a layer's forward: rounded to eight bits, in host memory, or both.

Parameters are kept by reference and read in the backward pass, for which engines that shard them
gather them again.
"""

from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.block_scaled import BlockScaled, Format, can_hold
from parallel.offload import Get, Offload

MIN_VALUES = 2**12  # of a tensor that is worth rounding


def apply_activation_storage(
    layers: Iterable[nn.Module],
    *,
    rounding: Format | None = None,
    rounded: tuple[type[nn.Module], ...] | None = None,
    offload: Offload | None = None,
) -> None:
    """Replaces the forward of every layer, in place, while its parameters are whole. Without
    rounding and offload, nothing changes.

    rounded: the kinds of modules inside a layer whose saved tensors may be rounded; None: the layer
    itself, where it is checkpointed and keeps its input alone. What is not floating, is short, or
    was saved outside of them before is kept exactly all the same.
    """
    if rounding is None and offload is None:
        return
    for layer in layers:
        saved = _Saved(layer, rounding, offload)
        layer.forward = partial(saved.run, layer.forward)
        for module in layer.modules() if rounding else ():
            if module is layer if rounded is None else isinstance(module, rounded):
                module.forward = partial(saved.run_rounding, module.forward)


class _Saved:
    """The hooks of one layer."""

    def __init__(self, layer: nn.Module, rounding: Format | None, offload: Offload | None) -> None:
        self._rounding, self._offload = rounding, offload
        self._depth = 0  # of modules whose saved tensors may be rounded
        self._modules = list(layer.modules())
        shapes = [parameter.shape for parameter in layer.parameters()]
        self._weights = {*shapes, *((*s[:-2], s[-1], s[-2]) for s in shapes if len(s) > 1)}
        # Of this forward, by the address of a storage: held weakly, it is given to no other.
        self._exact: dict[int, StorageWeakRef] = {}
        self._rounded: dict[Hashable, tuple[StorageWeakRef, Get]] = {}

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        layer = nullcontext() if self._offload is None else self._offload.layer()
        try:
            with layer, saved_tensors_hooks(self._pack, _unpack):
                return forward(*args, **kwargs)
        finally:
            self._exact.clear()
            self._rounded.clear()

    def run_rounding(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._depth -= 1

    def _pack(self, x: Tensor) -> Get:
        if parameters := self._parameters_at(x):
            return _reference(parameters, x)
        # Nor autocast's copies of weights, known by their shapes.
        if not x.is_floating_point() or x.shape in self._weights:
            return _unchanged(x)
        source = StorageWeakRef(x.untyped_storage())
        small = x.numel() < MIN_VALUES or not can_hold(x)
        if small or not self._depth or source.cdata in self._exact:
            self._exact[source.cdata] = source
            return self._keep(x)
        return self._round(x, source)

    def _parameters_at(self, x: Tensor) -> list[nn.Parameter]:
        """In the storage of `x`; several where an engine gathers them into one."""
        address = x.untyped_storage().data_ptr()
        return [
            parameter
            for module in self._modules
            for parameter in module.parameters(recurse=False)
            if not isinstance(parameter, DTensor)  # a shard, which is not what is computed with
            and parameter.untyped_storage().data_ptr() == address
        ]

    def _round(self, x: Tensor, source: StorageWeakRef) -> Get:
        assert self._rounding is not None
        view = (source.cdata, x._version, x.dtype, x.storage_offset(), x.shape, x.stride())
        if view not in self._rounded:
            held = BlockScaled.encode(x, self._rounding)
            codes, scales, dtype = self._keep(held.codes), self._keep(held.scales), held.dtype

            def get() -> Tensor:
                return BlockScaled(codes(), scales(), dtype).decode()

            self._rounded[view] = source, get
        return self._rounded[view][1]

    def _keep(self, x: Tensor) -> Get:
        if self._offload is None or not self._offload.takes(x):
            return _unchanged(x)
        return self._offload.put(x)


def _unpack(get: Get) -> Tensor:
    return get()


def _unchanged(x: Tensor) -> Get:
    return _guarded(x, lambda: x)


def _reference(parameters: list[nn.Parameter], x: Tensor) -> Get:
    """`x`, a view of one of them, as the same view of what that holds in the backward pass."""
    shape, stride = x.shape, x.stride()
    for parameter in parameters:
        first = x.storage_offset() - parameter.storage_offset()
        if 0 <= first < parameter.numel() and x.dtype == parameter.dtype:

            def get(parameter: nn.Parameter = parameter, first: int = int(first)) -> Tensor:
                start = parameter.storage_offset() + first
                return parameter.detach().as_strided(shape, stride, start)

            return _guarded(parameter, get)
    return _unchanged(x)


def _guarded(source: Tensor, get: Get) -> Get:
    """Holds the source to its version, as autograd does where there are no hooks."""
    version = source._version

    def guarded() -> Tensor:
        if source._version != version:
            shape = list(source.shape)
            raise RuntimeError(f"a tensor {shape} was written to between forward and backward")
        return get()

    return guarded
