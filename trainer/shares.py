"""What the routed layers of a model keep for softmax attention, and how even that leaves ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.hybrid import HybridLM
from models.load import BalancedRouter
from models.ops.routed import RoutedAttention
from models.routing import LearnedRouter
from parallel.collectives import sum_over_ranks
from parallel.mesh import Mesh
from trainer.metrics import Record


def softmax_shares(model: HybridLM, loads: Mapping[BalancedRouter, Tensor]) -> Record:
    """softmax_share/LAYER/HEAD, counted from 0, and their mean, softmax_share; nothing for a model
    without learned routing. loads: what the routers counted."""
    shares: dict[str, float] = {}
    for i, layer in enumerate(model.layers):
        for router in layer.modules():
            if isinstance(router, LearnedRouter):
                heads = enumerate(router.share(loads[router]).tolist())
                shares |= {f"softmax_share/{i}/{head}": share for head, share in heads}
    if not shares:
        return {}
    return {"softmax_share": sum(shares.values()) / len(shares), **shares}


def routed_imbalance(model: HybridLM, mesh: Mesh) -> Record:
    """routed_imbalance: pairs of chunks that routed attention multiplied since this was last
    called, largest over mean of the ranks; nothing for a model without. A call on every rank."""
    ops = [op for op in model.modules() if isinstance(op, RoutedAttention)]
    if not ops:
        return {}
    pairs = torch.zeros(mesh.ranks, dtype=torch.float64)
    pairs[mesh.rank] = sum(op.pairs for op in ops)
    for op in ops:
        op.pairs = 0
    sum_over_ranks(pairs, mesh.group)
    return {"routed_imbalance": float(pairs.max() / pairs.mean()) if pairs.any() else 1.0}
