"""The model that is converted, run layer by layer over calibration rows."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.hybrid import Layer
from models.ops.select import Ops
from models.residual import Stream
from models.sequence import SequenceInfo
from trainer.batch import Batch
from trainer.build import build_model
from trainer.checkpoint.weights import WeightSource

MEASURED_TOKENS = 4096  # of all rows, the last one cut; scores are squares of what lies in a row


@dataclass
class Observed:
    """What the mixer of a layer saw and gave.

    moment: [d_model + 1, d_model + 1], the mean of x x^T over the inputs x with a one behind them,
    in fp64; None without data. rows: inputs and outputs [1, S, d_model], at most MEASURED_TOKENS in
    all.
    """

    moment: Tensor | None = None
    rows: list[tuple[Tensor, Tensor, SequenceInfo]] = field(default_factory=list)


class Teacher:
    """Holds one layer and the rows' hidden states at a time."""

    def __init__(
        self, weights: WeightSource, batches: Sequence[Batch], *, device: torch.device
    ) -> None:
        embedding = weights.get("embed.weight")
        # In fp32 or wider, so that what is measured is the conversion.
        self.dtype = torch.promote_types(embedding.dtype, torch.float32)
        self.device = device
        self.ops = Ops(device=device, dtype=self.dtype)
        model, mixer = weights.config["model"], weights.config["mixer"]
        self.model = build_model(model, mixer, vocab_size=model["vocab_size"], ops=self.ops)
        self.model.eval()
        self.infos = [batch.info.to(device) for batch in batches]
        self.streams: list[Stream] = [
            (F.embedding(batch.tokens, embedding).to(device, self.dtype),) for batch in batches
        ]

    @torch.no_grad()
    def observe(self, index: int, tensors: Mapping[str, Tensor]) -> Observed:
        """Runs the next layer; tensors: its own, by their names in it."""
        seen = Observed()
        if not self.infos:
            return seen
        layer = cast(Layer, copy.deepcopy(self.model.layers[index]).to(self.dtype))
        layer.to_empty(device=self.device).load_state_dict(tensors)
        caught: list[Tensor] = []
        layer.mixer.register_forward_hook(lambda _, args, out: caught.extend((args[0], out)))
        tokens = sum(int(info.valid.sum()) for info in self.infos)
        left = MEASURED_TOKENS
        seen.moment = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, info in enumerate(self.infos):
            self.streams[i] = layer(self.streams[i], info)
            x, output = caught
            caught.clear()
            ones = F.pad(x[info.valid].double(), (0, 1), value=1.0)
            seen.moment = seen.moment + ones.T @ ones / tokens
            if kept := min(left, x.shape[1]):
                seen.rows.append((x[:, :kept], output[:, :kept], info.first(kept)))
            left -= kept
        return seen
