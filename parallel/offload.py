"""Saved tensors in host memory from the forward pass to the backward pass, bit by bit the same.

A layer's tensors leave on a stream of their own while the next layer computes, and come back while
the layer behind it is differentiated: the device holds those of two layers at a time. What the last
layer saved is still there when the backward pass begins, and is used as it is.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# What crosses to the host at 25 GB/s in ten microseconds, about as long as a copy takes to launch.
MIN_BYTES = 2**18

Get = Callable[[], Tensor]


class Offload:
    """For layers that run one after the other, with `layer()` around the forward of each.

    Storages are copied whole and once, however many views of one are saved, and by however many
    layers. Where the device is a CPU, the copies lie in the same memory: good for tests alone.
    """

    def __init__(self, device: torch.device, *, min_bytes: int = MIN_BYTES) -> None:
        self.min_bytes, self._device = min_bytes, device
        self._wire = _Wire(device)
        self._copies: weakref.WeakValueDictionary[int, _Copy] = weakref.WeakValueDictionary()
        self._layer = _Layer(self._wire, None)
        self._leaving: _Layer | None = None  # the device still has its tensors
        self._arriving: _Layer | None = None

    @contextmanager
    def layer(self) -> Iterator[None]:
        self._settle()
        self._layer = _Layer(self._wire, self._layer)
        yield
        self._layer.leave()
        if self._leaving is not None:
            self._leaving.release()
        self._leaving = self._layer

    def takes(self, x: Tensor) -> bool:
        return x.device.type == self._device.type and x.untyped_storage().nbytes() >= self.min_bytes

    def put(self, x: Tensor) -> Get:
        """-> what gives back `x` as it is now, in the storage of all its saved views."""
        source = StorageWeakRef(x.untyped_storage())
        copy = self._copies.get(source.cdata)
        if copy is None or copy.version != x._version:
            copy = self._copies[source.cdata] = _Copy(x, source)
        self._layer.add(copy)
        layer, dtype, place = self._layer, x.dtype, (x.storage_offset(), x.shape, x.stride())

        def get() -> Tensor:
            self._fetch(layer)
            data = copy.data()
            return data.new_empty(0, dtype=dtype).set_(data.untyped_storage(), *place)

        return get

    def _fetch(self, layer: "_Layer") -> None:
        layer.bring()
        layer.settle()
        before = layer.before()
        if before is not None and before is not self._arriving:
            self._settle()
            self._arriving = before
            before.bring()

    def _settle(self) -> None:
        """No memory that a copy is still writing to may be given away."""
        if self._arriving is not None:
            self._arriving.settle()
        self._arriving = None


class _Copy:
    """The bytes of one storage: `here` on the device, unless they are away."""

    def __init__(self, x: Tensor, source: StorageWeakRef) -> None:
        self.here: Tensor | None = x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())
        self.host: Tensor | None = None
        self.version = x._version
        self._source = source  # as long as it is held, no other storage has this address

    def data(self) -> Tensor:
        assert self.here is not None
        return self.here


class _Layer:
    """What one forward of a layer has saved. Only the graph keeps copies alive."""

    def __init__(self, wire: "_Wire", before: "_Layer | None") -> None:
        self.before: Callable[[], _Layer | None] = (
            (lambda: None) if before is None else weakref.ref(before)
        )
        self._wire = wire
        self._copies: list[weakref.ref[_Copy]] = []
        self._incoming: list[Tensor] = []
        self._brought = False
        self._gone: torch.cuda.Event | None = None
        self._back: torch.cuda.Event | None = None

    def add(self, copy: _Copy) -> None:
        self._copies.append(weakref.ref(copy))

    def _alive(self) -> Iterator[_Copy]:
        return (copy for ref in self._copies if (copy := ref()) is not None)

    def leave(self) -> None:
        pairs = []
        for copy in self._alive():
            if copy.host is None:
                copy.host = self._wire.host_like(copy.data())
                pairs.append((copy.host, copy.data()))
        if pairs:
            self._gone = self._wire.send(pairs)

    def release(self) -> None:
        self._wire.wait(self._gone)
        self._brought = False
        for copy in self._alive():
            copy.here = None

    def bring(self) -> None:
        if self._brought:
            return
        self._brought, pairs = True, []
        for copy in self._alive():
            if copy.here is None:
                assert copy.host is not None
                copy.here = self._wire.device_like(copy.host)
                pairs.append((copy.here, copy.host))
        if pairs:
            self._incoming = [here for here, _ in pairs]
            self._back = self._wire.send(pairs)

    def settle(self) -> None:
        """Orders the copies before whatever the device is given to do from now on."""
        self._wire.wait(self._gone)
        self._wire.wait(self._back)
        self._gone = self._back = None
        self._incoming = []


class _Wire:
    """Copies between device and host, on a stream of their own where there are streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def host_like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)

    def device_like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=self._device)

    def send(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copies second to first, behind all that the device has been given to do; -> when."""
        if self._stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
