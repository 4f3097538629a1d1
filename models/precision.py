"""Numbers that are never narrower than fp32: gates, decays, routing, states, norms' statistics."""

import torch
from torch import Tensor, nn


class Island(nn.Module):
    """Base of modules whose parameters are never narrower than fp32, whatever surrounds them.

    Nothing but their own forward reads these parameters, so that an engine may keep them in shards
    and in a dtype of their own.
    """


def widen(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`: what an fp32 submodule computes in."""
    return torch.autocast(x.device.type, enabled=False)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inside autocast the tensors in its dtype, as a linear layer would take them; fp64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
