"""Parameters, gradients and optimiser state in shards: torch's `fully_shard` over our groups.

Every rank keeps its rows of each parameter. A layer is gathered while it computes; what is left,
the root, stays whole from the forward to the backward pass. Where products are narrower than
parameters a layer is gathered in the dtype of products, but for its islands, a group of messages of
their own, in that of the parameters.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from models.precision import Island
from parallel.collectives import gather_rows, sum_scatter_rows
from parallel.mesh import Mesh, subgroup

# A stream of several tensors passes through a layer, and nothing is done to one in place.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPLayer\) returned a view")


@functools.lru_cache(maxsize=1)
def shard_mesh(mesh: Mesh, shard_ranks: int) -> DeviceMesh:
    """[ranks], or [copies, shards] where `shard_ranks` neighbours hold a copy. Collective.

    One for all who ask: communicators take memory on a device.
    """
    assert mesh.group is not None
    if shard_ranks == mesh.ranks:
        return DeviceMesh.from_group(mesh.group, mesh.device.type)
    ranks = torch.arange(mesh.ranks).view(-1, shard_ranks)
    groups = [subgroup(part, mesh.device, mesh.timeout) for part in (ranks.T, ranks)]
    names = ("copies", "shards")
    return DeviceMesh.from_group(groups, mesh.device.type, mesh=ranks, mesh_dim_names=names)


class Sharding:
    """Gradients are sums over all ranks of the run, whoever holds the same rows.

    shard_ranks: how many neighbours hold one copy of the model, a divisor of the run's ranks;
    products: the dtype of matrix products, where it is not that of the parameters.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        shard_ranks: int,
        products: torch.dtype | None,
        reshard_after_forward: bool,
        cpu_offload: bool,
    ) -> None:
        self._mesh = shard_mesh(mesh, shard_ranks)
        self.group = self._mesh.get_group(self._mesh.ndim - 1)
        self._parts: list[FSDPModule] = []
        self._reshard_after_forward = reshard_after_forward
        self._offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
        # Modules cast their inputs themselves: the residual stream is wider than products.
        self._wide = MixedPrecisionPolicy(cast_forward_inputs=False)
        self._narrow = products and MixedPrecisionPolicy(
            param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def layer(self, layer: nn.Module) -> None:
        """Leaves this rank its rows of the parameters of a layer."""
        islands: list[nn.Module] = [m for m in layer.modules() if isinstance(m, Island)]
        if self._narrow and islands:
            self._shard(islands, self._wide, self._reshard_after_forward)
        self._shard([layer], self._narrow or self._wide, self._reshard_after_forward)
        _pass_by(layer)

    def root(self, module: nn.Module) -> None:
        """The same with all that is in no layer; comes last."""
        self._shard([module], self._wide, reshard_after_forward=False)
        _pass_by(module)

    def reduce_next(self, shards: bool, *, copies: bool) -> None:
        """Whether the next backward pass sums gradients into shards, and these over copies."""
        for part in self._parts:
            part.set_requires_gradient_sync(shards, recurse=False)
            part.set_requires_all_reduce(copies, recurse=False)

    def free(self) -> None:
        """Drops what is gathered, as a backward pass does: behind a forward pass alone."""
        for part in self._parts:
            part.reshard()

    def _shard(
        self, modules: list[nn.Module], policy: MixedPrecisionPolicy, reshard_after_forward: bool
    ) -> None:
        """One group of messages, for modules that all depend on the first of them to run."""
        (part, *_) = fully_shard(
            modules,
            mesh=self._mesh,
            mp_policy=policy,
            offload_policy=self._offload,
            reshard_after_forward=reshard_after_forward,
        )
        gather: Any = _Gather()
        sum_scatter: Any = _SumScatter()
        part.set_custom_all_gather(gather)
        part.set_custom_reduce_scatter(sum_scatter)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        self._parts.append(part)


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be in shards."""
    return x.to_local() if isinstance(x, DTensor) else x


def copy_whole(target: Tensor, value: Tensor) -> None:
    """Takes from a whole tensor what this rank holds of `target`; without messages."""
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    local(target).copy_(value)


class _Messages:
    """What `fully_shard` sends with, so that a lost rank is told as everywhere else."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Messages):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        return gather_rows(output_tensor, input_tensor, group, async_op=async_op)


class _SumScatter(_Messages):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        assert op == dist.ReduceOp.SUM, op
        return sum_scatter_rows(output_tensor, input_tensor, group, async_op=async_op)


class _Passed:
    """Hides an argument."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def _pass_by(module: nn.Module) -> None:
    """Leads arguments without gradients past the hooks of `fully_shard`.

    These look for tensors in every field of every argument: 36 ms a call for a `SequenceInfo` of
    1,000 fragments.
    """

    def hide(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(x if isinstance(x, Tensor | tuple) else _Passed(x) for x in args), kwargs

    def show(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(x.value if isinstance(x, _Passed) else x for x in args), kwargs

    module.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    module.register_forward_pre_hook(show, with_kwargs=True)
