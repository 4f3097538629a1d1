"""How far a conversion is from what it converts, on rows of input."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.convert.forms import Attention, Decoupled, Heads
from models.sequence import SequenceInfo


class Error(NamedTuple):
    """Norm of the differences over the norm of what they should be."""

    scores: float  # before the softmax, of keys that the query sees
    outputs: float  # of the layer, before any gate


@dataclass(frozen=True, eq=False)
class Row:
    """The input of a layer, packed documents without padding."""

    x: Tensor  # [S, d_model]
    index: Tensor  # [S], see `SequenceInfo`
    positions: Tensor  # [S]

    @classmethod
    def of(cls, x: Tensor, info: SequenceInfo) -> "Row":
        """x: [1, S, d_model]."""
        return cls(x[info.valid], info.index[info.valid], info.positions[info.valid])

    def seen(self) -> Tensor:
        """[S, S]: whether a query may attend to a key."""
        start = self.index - self.positions
        earlier = self.index[None, :] <= self.index[:, None]
        return earlier & (start[None, :] == start[:, None])


def errors(
    attention: Attention, forms: Sequence[Attention | Decoupled], rows: Iterable[Row]
) -> list[Error]:
    """Of each form of the attention, over all rows together."""
    sums = torch.zeros(len(forms), 2, 2, dtype=torch.float64)
    for row in rows:
        x, positions, seen = row.x.double(), row.positions.double(), row.seen()
        exact = attention.heads(x, positions)
        for i, form in enumerate(forms):
            sums[i] += _squares(form.heads(x, positions), exact, attention.out, seen).cpu()
    relative = (sums[..., 0] / sums[..., 1]).sqrt()
    return [Error(*pair) for pair in relative.tolist()]


def _squares(heads: Heads, exact: Heads, out: Tensor, seen: Tensor) -> Tensor:
    """[2, 2]: squares of differences and of what should be, of scores and of outputs."""
    sums = out.new_zeros(2, 2)
    for head in range(exact.query.shape[1]):
        should_be = exact.scores(head)[seen]
        difference = heads.scores(head)[seen] - should_be
        sums[0] += torch.stack([difference.square().sum(), should_be.square().sum()])
    should_be = exact.output(seen) @ out.T
    difference = heads.output(seen) @ out.T - should_be
    sums[1] = torch.stack([difference.square().sum(), should_be.square().sum()])
    return sums
