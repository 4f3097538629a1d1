"""Sums of gradients over ranks, sent in buckets while the backward pass still runs.

Buckets are made once, and sent in the order in which they were made, on every rank. So sums are
formed in the same order in every step of every process, which torch's DistributedDataParallel
does not promise: it makes new buckets after its first step, and a resumed run, which has another
first step, would round otherwise than an uninterrupted one.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn

from parallel.collectives import reaching_ranks, start_sum


class _Bucket:
    """Gradients that travel together: views of one flat tensor."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.flat = parameters[0].new_empty(sum(p.numel() for p in parameters))
        parts = self.flat.split([p.numel() for p in parameters])
        self.views = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        self.missing = 0
        self.work: dist.Work | None = None

    def open(self) -> None:
        """Zeroes the gradients, so that a parameter that is not reached counts as that."""
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view


class GradientReducer:
    """A step is `open()`, backward passes, `sum_next()`, the last backward pass, `finish()`."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, *, bucket_mb: float
    ) -> None:
        self._group = group
        # Backward reaches the last layers first: their gradients go first.
        self._buckets = [_Bucket(part) for part in _cut([*parameters][::-1], bucket_mb * 2**20)]
        self._bucket_of: dict[Tensor, _Bucket] = {
            p: bucket for bucket in self._buckets for p in bucket.parameters
        }
        self._sent = len(self._buckets)
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._count)

    def open(self) -> None:
        """Gives every parameter a zero gradient that lies in its bucket."""
        for bucket in self._buckets:
            bucket.open()

    def sum_next(self) -> None:
        """From here on a bucket is sent when the last of its gradients is there."""
        self._sent = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Sends what waited for gradients that never came; all gradients are sums then."""
        for bucket in self._buckets:
            bucket.missing = 0
        self._send()
        with reaching_ranks():
            for bucket in self._buckets:
                if bucket.work is not None:
                    bucket.work.wait()

    def _count(self, parameter: Tensor) -> None:
        if self._sent < len(self._buckets):
            self._bucket_of[parameter].missing -= 1
            self._send()

    def _send(self) -> None:
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            bucket = self._buckets[self._sent]
            bucket.work = start_sum(bucket.flat, self._group)
            self._sent += 1


def _cut(parameters: list[nn.Parameter], size: float) -> list[list[nn.Parameter]]:
    """Runs of parameters of one dtype, each closed by the parameter that reaches `size` bytes."""
    parts: list[list[nn.Parameter]] = []
    filled = size
    for parameter in parameters:
        if filled >= size or parameter.dtype != parts[-1][0].dtype:
            parts.append([])
            filled = 0
        parts[-1].append(parameter)
        filled += parameter.numel() * parameter.element_size()
    return parts
