"""Text from a model: the prompt in one pass, then a token at a time from the layers' caches."""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.hybrid import HybridLM
from models.mixer import Cache
from models.sequence import SequenceInfo


@torch.no_grad()
def generate(
    model: HybridLM,
    prompt: Tensor,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields `tokens` new ids, [batch] each, behind prompt [batch, seq >= 1].

    temperature 0 takes the likeliest token; else top_k and top_p bound what is sampled from.
    """
    caches: list[Cache] = [{} for _ in model.layers]
    fed, seen = prompt, 0
    for _ in range(tokens):
        stop = seen + fed.shape[1]
        info = SequenceInfo.span(len(fed), seen, stop, fed.device)
        hidden = model(fed, info, caches)
        logits = hidden[:, -1] @ model.head_weight.mT
        chosen = _choose(logits.float(), temperature, top_k, top_p, generator)
        yield chosen
        fed, seen = chosen.unsqueeze(1), stop


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """[batch, vocab] -> [batch]."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0.0  # the likeliest token always stays
    place = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, place).squeeze(-1)
