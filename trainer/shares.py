"""What part of the tokens the routed layers of a model keep for softmax attention."""

from collections.abc import Mapping

from torch import Tensor

from models.hybrid import HybridLM
from models.load import BalancedRouter
from models.routing import LearnedRouter
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
