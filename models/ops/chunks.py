"""A row of tokens as chunks, and chunks as segments: the grid that recurrences are computed on.

Shapes: n chunks of a segment first, then batch x heads, C tokens, K and V channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Inputs(NamedTuple):
    """A segment as [n x batch x heads, C, ...]; beta [n x batch x heads, C, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor  # per key channel, or one
    beta: Tensor


def cut(x: Tensor, chunk: int) -> Tensor:
    """[batch, seq, heads(, dim)] -> [n x batch x heads, chunk, dim].

    A short tail gets zeros, which neither read nor write nor decay a state.
    """
    if x.dim() == 3:
        x = x.unsqueeze(-1)
    if x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    x = x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)
    return x.reshape(-1, chunk, x.shape[-1])


def join(x: Tensor, batch: int, heads: int, seq: int) -> Tensor:
    """The inverse of cutting: [n x batch x heads, C, dim] -> [batch, seq, heads, dim]."""
    x = x.unflatten(0, (-1, batch, heads)).permute(1, 0, 3, 2, 4)
    return x.flatten(1, 2)[:, :seq]


def entering(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """The state before the first token, [batch, heads, K, V]; zeros where there is none."""
    if state is not None:
        return state.to(k.dtype)
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])


class Documents(NamedTuple):
    """Where documents start inside the chunks of a segment; masks broadcast over K or C."""

    same: Tensor  # [X, C, C], both tokens are of one document
    from_start: Tensor  # [X, C, 1], no start up to this token
    to_end: Tensor  # [X, C, 1], no start after this token

    @classmethod
    def find(cls, starts: Tensor, heads: int, chunk: int) -> "Documents | None":
        """None where no document of the segment starts; starts [batch, seq] bool."""
        if not starts.any():
            return None
        document = cut(starts[:, :, None].expand(-1, -1, heads).long(), chunk).cumsum(1)
        return cls(document == document.mT, document == 0, document == document[:, -1:])


class Grid(NamedTuple):
    """How a row is cut into segments of chunks."""

    starts: Tensor  # [batch, seq] bool, document starts
    chunk: int  # tokens
    segment: int  # tokens

    def parts(self) -> list[slice]:
        seq = self.starts.shape[1]
        return [slice(i, min(i + self.segment, seq)) for i in range(0, seq, self.segment)]

    def cut(self, tensors: Sequence[Tensor], part: slice) -> tuple[Inputs, Documents | None]:
        """One segment of q, k, v, log_decay, beta."""
        documents = Documents.find(self.starts[:, part], tensors[0].shape[2], self.chunk)
        return Inputs(*(cut(x[:, part], self.chunk) for x in tensors)), documents
