"""Text from a model: the prompt in one pass, then a token at a time from the layers' caches."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from models.hybrid import HybridLM
from models.mixer import Cache
from models.sequence import SequenceInfo
from parallel.mesh import join
from trainer.build import build_ops
from trainer.data import build_tokenizer
from trainer.data.tokenizer import as_bytes
from trainer.errors import ConfigError
from trainer.load import load_model, tokenizer_of
from trainer.settings import Numerics, Precision


def write_text(
    *,
    checkpoint: str,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    precision: Precision | None,
    tokenizer: str | None,
    ops: Mapping[str, Any],
) -> Iterator[str]:
    """Yields the prompt, then the text that the model writes behind it, as it is written.

    The keywords are the keys of conf/generate.yaml; raises ConfigError naming the one that is
    wrong. Ends with the document, or after `tokens` tokens.
    """
    for key, value, fits, allowed in (
        ("tokens", tokens, tokens >= 1, "1 or more"),
        ("temperature", temperature, temperature >= 0, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more, or null"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, up to 1"),
    ):
        if not fits:
            raise ConfigError(f"{key}={value}: allowed: {allowed}")
    device = join().device
    numerics = Numerics.choose(precision, device)
    text = build_tokenizer(tokenizer or tokenizer_of("checkpoint", checkpoint, other="tokenizer"))
    model = load_model(
        checkpoint,
        ops=build_ops(ops, device, numerics.products),
        device=device,
        dtype=numerics.parameters,
        vocab_size=text.vocab_size,
    )
    ids = torch.tensor([*text.start, *text.encode(prompt).tolist()], device=device)
    if not len(ids):
        raise ConfigError("prompt is empty; allowed: at least one token to start from")
    yield as_bytes(prompt).decode("utf-8", errors="replace")
    written: list[int] = []
    shown = ""
    with torch.autocast(device.type, numerics.autocast, enabled=numerics.autocast is not None):
        for (token,) in generate(
            model,
            ids.unsqueeze(0),
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator(device).manual_seed(seed),
        ):
            if token == text.eos_id:
                break
            written.append(int(token))
            whole = text.decode(written)
            if not whole.endswith("\ufffd"):  # else the last character still lacks some bytes
                yield whole[len(shown) :]
                shown = whole
    yield text.decode(written)[len(shown) :]


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
