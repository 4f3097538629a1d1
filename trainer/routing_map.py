"""Which chunks of a text each head of the routed layers keeps for softmax attention, as a picture
or as the text itself in colours."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.hybrid import HybridLM
from models.mixers.nats_l import NeuralAttentionSearch
from models.sequence import SequenceInfo
from parallel.mesh import join
from trainer.build import build_ops
from trainer.data import build_tokenizer
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.evals.pictures import draw_routing
from trainer.load import load_model, tokenizer_of
from trainer.settings import Numerics, Precision


class Routed(NamedTuple):
    """One layer: kept [heads, chunks] bool, chunks of so many tokens."""

    kept: NDArray[np.bool_]
    chunk: int


def write_map(
    *,
    checkpoint: str,
    text: str,
    target: str,
    tokens: int,
    precision: Precision | None,
    tokenizer: str | None,
    ops: Mapping[str, Any],
) -> list[str]:
    """Writes `target`; -> a line for each layer, with the share that each head keeps.

    The keywords are the keys of conf/inspect_routing.yaml; raises ConfigError naming the one that
    is wrong.
    """
    path = Path(target)
    if path.suffix not in (".png", ".html"):
        raise ConfigError(f"target={target}: allowed: a name that ends in .png or .html")
    if tokens < 1:
        raise ConfigError(f"tokens={tokens}: allowed: 1 or more")
    try:
        content = Path(text).read_bytes()
    except OSError as error:
        raise ConfigError(f"text={text}: {error.strerror}; allowed: a file") from None
    device = join().device
    numerics = Numerics.choose(precision, device)
    words = build_tokenizer(tokenizer or tokenizer_of("checkpoint", checkpoint, other="tokenizer"))
    model = load_model(
        checkpoint,
        ops=build_ops(ops, device, numerics.products),
        device=device,
        dtype=numerics.parameters,
        vocab_size=words.vocab_size,
    )
    written = words.encode(content)[:tokens].tolist()
    if not written:
        raise ConfigError(f"text={text}: it is empty; allowed: at least one token")
    with torch.autocast(device.type, numerics.autocast, enabled=numerics.autocast is not None):
        ids = [*words.start, *written]
        layers = route(model, torch.tensor(ids, device=device))
    if not layers:
        raise ConfigError(f"checkpoint={checkpoint}: allowed: a model with nats_l in its pattern")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        draw_routing(path, {layer: routed.kept for layer, routed in layers.items()})
    else:
        path.write_text(page(layers, ids, words))
    return [
        f"layer {layer}: kept {' '.join(f'{share:.0%}' for share in routed.kept.mean(1))}"
        for layer, routed in layers.items()
    ]


@torch.no_grad()
def route(model: HybridLM, ids: Tensor) -> dict[int, Routed]:
    """By layer, what its router does with one document [seq]."""
    found: dict[int, Routed] = {}
    hooks = []
    for i, layer in enumerate(model.layers):
        if not isinstance(layer.mixer, NeuralAttentionSearch):
            continue
        chunk = layer.mixer.token_multiple

        def record(_, __, routing, i=i, chunk=chunk) -> None:
            found[i] = Routed(routing.keep[0].T.cpu().numpy() > 0, chunk)

        hooks.append(layer.mixer.router.register_forward_hook(record))
    model(ids.unsqueeze(0), SequenceInfo.span(1, 0, len(ids), ids.device))
    for hook in hooks:
        hook.remove()
    return found


def page(layers: Mapping[int, Routed], ids: Sequence[int], words: Tokenizer) -> str:
    """The text in spans of the shortest chunk: the more heads keep it the darker, and with the
    heads' names, layer.head, where the pointer rests."""
    size = min(routed.chunk for routed in layers.values())
    spans = []
    for start in range(0, len(ids), size):
        kept = {
            f"{layer}.{head}": row[start // routed.chunk]
            for layer, routed in layers.items()
            for head, row in enumerate(routed.kept)
        }
        share = sum(kept.values()) / len(kept)
        names = " ".join(name for name, is_kept in kept.items() if is_kept) or "none"
        piece = escape(words.decode(list(ids[start : start + size])))
        style = f"background: rgba(214, 96, 77, {share:.2f})"
        spans.append(f'<span style="{style}" title="{start}: {share:.0%} kept, by {names}">')
        spans.append(f"{piece}</span>")
    head = '<!doctype html>\n<meta charset="utf-8">\n<title>Chunks kept for attention</title>\n'
    return f'{head}<pre style="white-space: pre-wrap">{"".join(spans)}</pre>\n'
