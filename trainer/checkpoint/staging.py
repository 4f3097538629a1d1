"""Copies of a state in host memory, taken while the next step computes its gradients."""

import contextlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.engine import State


class HostBuffers:
    """Memory for one copy of a state, kept from save to save; pinned for tensors on CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._written: torch.cuda.Event | None = None

    def mark(self) -> None:
        """The state to be copied is that behind all the device has been given to do so far."""
        if torch.cuda.is_available():
            self._stream = self._stream or torch.cuda.Stream()
            self._written = torch.cuda.current_stream().record_event()

    def copy(self, state: State) -> State:
        """The state in host memory, complete on return; a DTensor stays one.

        May be called in another thread than `mark` was.
        """
        with torch.no_grad(), self._beside():
            copied = {
                section: {name: self._take((section, name), x) for name, x in values.items()}
                for section, values in state.items()
            }
        if self._stream is not None:
            self._stream.synchronize()
        return copied

    def _beside(self) -> contextlib.AbstractContextManager:
        """A stream of our own, so that the copies do not wait for the kernels of the next step."""
        if self._stream is None or self._written is None:
            return contextlib.nullcontext()
        self._stream.wait_event(self._written)
        return torch.cuda.stream(self._stream)

    def _take(self, key: tuple[str, str], x: Tensor) -> Tensor:
        if isinstance(x, DTensor):
            local = self._take(key, x.to_local())
            return DTensor(local, x._spec, requires_grad=False)  # from_local would move it back
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != x.shape or buffer.dtype != x.dtype:
            buffer = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(x, non_blocking=True)
