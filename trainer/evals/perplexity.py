"""Token-mean loss on a source of documents, each token with a predecessor scored once."""

import math
from collections.abc import Iterable

import torch

from parallel.collectives import sum_over_ranks
from parallel.mesh import Mesh
from trainer.batch import Batch
from trainer.loss import LanguageModelLoss


@torch.no_grad()
def run(loss: LanguageModelLoss, batches: Iterable[Batch], mesh: Mesh) -> dict[str, float | None]:
    """loss in nats a token, perplexity, and the number of tokens scored, over all ranks.

    batches: this rank's share. What is not finite is None, as JSON has no name for it.
    """
    total = torch.zeros(2, dtype=torch.float64)  # loss, tokens
    for batch in batches:
        total[0] += loss(batch.to(mesh.device)).cpu()
        total[1] += batch.valid_labels
    nats, tokens = sum_over_ranks(total, mesh.group).tolist()
    mean = nats / tokens if tokens else math.nan
    figures = {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
    finite = {name: x if math.isfinite(x) else None for name, x in figures.items()}
    return {**finite, "tokens": int(tokens)}
