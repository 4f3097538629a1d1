"""AdamW with decoupled weight decay (arXiv 1711.05101) and its parameter groups."""

import torch
from torch import nn


def adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """Raises ValueError unless lr and eps are positive, weight_decay >= 0 and betas in [0, 1)."""
    # torch takes an eps of 0, which makes 0 / 0 of a gradient that never was: an unused byte's.
    for name, value in (("lr", lr), ("eps", eps)):
        if value <= 0:
            raise ValueError(f"{name} is {value}; allowed: above 0")
    decayed, rest = decay_groups(model)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    # One kernel over all parameters; torch has it for CPU and CUDA alike.
    return torch.optim.AdamW(
        groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=True
    )


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices, which decay, and embeddings, norms, gates, biases, which do not; none frozen."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and parameter not in embeddings
        (decayed if matrix else rest).append(parameter)
    return decayed, rest
