"""What DeepSpeed's optimisers hold of a model on this rank: flat partitions of its parameters.

Stages 1 and 2 have one class, stage 3 another; the differences between them end here.
"""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn


class Partitions:
    """zero: DeepSpeed's optimiser around one of torch's, whose state per parameter has `keys`:
    moments, of the parameter's shape, and counts, which are the same for all parameters.

    Creates that state, which is left to the first step otherwise, so that there is something to
    load into; and DeepSpeed looks for it in all groups when it has made that of the first.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        zero.clip_grad = 0.0  # it clips to 1 without being asked
        self.sharded = hasattr(zero, "fp32_partitioned_groups_flat")  # the parameters: stage 3
        if self.sharded:
            self._flats = zero.fp32_partitioned_groups_flat
            groups = [zero.sub_group_to_group_id[i] for i in range(len(self._flats))]
        else:
            self._flats = zero.single_partition_of_fp32_groups
            groups = list(range(len(self._flats)))
        self._offloaded = all(flat.grad is not None for flat in self._flats)
        if self.sharded and not self._offloaded:
            self._drop_copy()
        _create_state(zero.optimizer, self._flats, groups)
        self.keys = list(self._state(0))
        self._counts = {key: x for key, x in self._state(0).items() if x.dim() == 0}
        if not self.sharded:
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def nbytes(self) -> int:
        """Of the parameters whose update this rank does."""
        return sum(flat.nbytes for flat in self._flats)

    def gradients(self) -> list[Tensor]:
        """Views, there behind the last micro-batch of a step; where there is padding it is 0."""
        if self._offloaded:
            get_accelerator().synchronize()  # they may still be on their way
            return [flat.grad for flat in self._flats]
        return [x for part in self._zero.averaged_gradients.values() for x in part]

    def drop_gradients(self) -> None:
        """As DeepSpeed's own step does when they overflow, for which it has no call."""
        zero = self._zero
        zero.zero_grad()
        if self._offloaded:
            zero.reset_cpu_buffers()
        if self.sharded:
            zero.averaged_gradients = {}
            return
        zero.micro_step_id = -1
        for parts in (zero.averaged_gradients, zero.all_grad_tensors):
            parts.update(dict.fromkeys(parts))  # in place: the parameters refer to them

    def shape(self, parameter: Tensor, key: str | None = None) -> torch.Size:
        """Of the whole, of which stage 3 leaves an empty tensor; key: of the optimiser's state."""
        if key in self._counts:
            return torch.Size()
        return getattr(parameter, "ds_shape", parameter.shape)

    def read(self, parameter: nn.Parameter, key: str | None = None) -> tuple[Tensor, bool]:
        """The whole of a parameter or of its state in fp32, and whether every rank keeps that, so
        that it is no copy. Collective."""
        if key in self._counts:
            return self._counts[key], True
        if key is not None:
            return safe_get_full_optimizer_state(parameter, key), False
        if not self.sharded and parameter.dtype == torch.float32:
            return parameter.detach(), True
        if not parameter.requires_grad:
            with GatheredParameters(parameter):
                return parameter.detach().clone(), False
        return safe_get_full_fp32_param(parameter), False

    @torch.no_grad()
    def write(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """value: whole, on the parameter's device, and the same on all ranks. Collective."""
        if key in self._counts:
            for i in range(len(self._flats)):
                self._state(i)[key].copy_(value)
        elif self.sharded:
            self._write_sharded(parameter, value, key)
        elif key is not None:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)

    def _write_sharded(self, parameter: Any, value: Tensor, key: str | None) -> None:
        size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
        part = value.flatten()[rank * size : (rank + 1) * size]
        own = torch.cat([part, part.new_zeros(size - len(part))])  # the last one is filled up
        if key is not None:
            safe_set_local_optimizer_state(parameter, own, key)
            return
        with GatheredParameters(parameter, modifier_rank=0):
            parameter.copy_(value)
        if not parameter.requires_grad:
            return
        safe_set_local_fp32_param(parameter, own)

    def _state(self, i: int) -> dict[str, Tensor]:
        return self._zero.optimizer.state[self._flats[i]]

    def _drop_copy(self) -> None:
        """Lets fp32 parameters be their own master copies.

        So does DeepSpeed if they are on the same device, but it compares that with its name.
        """
        zero = self._zero
        for i, flat in enumerate(self._flats):
            weights = zero.fp16_partitioned_groups_flat[i]
            if weights.dtype == flat.dtype and weights.device == flat.device:
                zero.fp16_partitioned_groups_flat[i] = flat.detach()
                zero._unflatten_partitioned_parameters(i)
                zero.lp_param_buffer = None


def _create_state(optimizer: torch.optim.Optimizer, flats: list[Tensor], groups: list[int]) -> None:
    """By a step of gradients and rate 0, which moves nothing and is not counted.

    groups: of each flat parameter the index of its group.
    """
    kept = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    lent = [flat for flat in flats if flat.grad is None]
    for flat in lent:
        flat.grad = torch.zeros_like(flat)
    for i, group in enumerate(optimizer.param_groups):
        group["params"] = [flat for flat, of in zip(flats, groups, strict=True) if of == i]
        group["lr"] = 0.0
    optimizer.step()
    for group, (params, lr) in zip(optimizer.param_groups, kept, strict=True):
        group["params"], group["lr"] = params, lr
    for flat in lent:
        flat.grad = None
    for flat in flats:
        for x in optimizer.state[flat].values():
            x.zero_()
