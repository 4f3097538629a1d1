"""The contracts of token-level routing: softmax attention and recurrence, chunk by chunk and head
by head; NAtS-L, arXiv 2602.03681.

A document is cut into chunks of `chunk` tokens from its start on. Runs of a row start at multiples
of `chunk` in their documents, and end at one or with the document; anything else is a ValueError.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from models.sequence import (
    LinearRecurrence,
    Recurrent,
    Response,
    SequenceInfo,
    SequenceOp,
    affine_response,
)

ABSENT = torch.iinfo(torch.int64).max  # the index of no chunk: behind every query


def keys_and_values(k: Tensor, v: Tensor | None) -> tuple[Tensor, ...]:
    """Both; or, where v is None, the one tensor that is both."""
    return (k,) if v is None else (k, v)


class RoutedKeys(NamedTuple):
    """Chunks of keys and values, other ones for each key head."""

    kv: tuple[Tensor, ...]  # `keys_and_values`, each [batch, kv_heads, slots, chunk, dim or v_dim]
    # [batch, kv_heads, slots] int64: of a chunk's first token in the packed global sequence, or
    # ABSENT for an empty slot
    start: Tensor


class RoutedAttention(SequenceOp):
    """Causal softmax attention to the own chunk and to earlier ones that a router kept.

    A query sees the keys of its own chunk up to itself and, of the earlier chunks of its document,
    those that are kept.
    own: whether a query sees its own chunk. counterfactual: whether a chunk that is not kept has a
    gradient too, that of keeping a little of it. pairs: of a query's chunk and an earlier one that
    met, head by head, in all backward passes so far; what uneven work of ranks shows in.
    """

    def __init__(self, *, chunk: int, own: bool = True, counterfactual: bool = False) -> None:
        super().__init__()
        self.chunk, self.own, self.counterfactual = chunk, own, counterfactual
        self.pairs = 0

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        keep: Tensor,
        info: SequenceInfo,
        *,
        scale: float | None = None,
        past: RoutedKeys | None = None,
    ) -> Tensor:
        """-> [batch, seq, heads, v_dim], 0 where a query sees no key.

        q, k, v as in `SoftmaxAttention`; v None: the keys are the values, too. keep: [batch, seq,
        kv_heads] 0 or 1, equal for the tokens of a chunk: for later chunks it multiplies
        exp(score), and so has a gradient, of which the sum over a chunk is defined. past: kept
        chunks that come before the row, in decoding.
        """


class RoutedRecurrence(LinearRecurrence):
    """A recurrence whose writes are gated chunk by chunk.

    Inside a chunk the state evolves, and is read, as ever. What a chunk leaves to the next one is
    D S + write (S' - D S), where S entered, D is the decay of all its tokens and S' the state after
    them: with write 0 the state only decays. As this is affine in S, so is a segment. A row
    that ends inside a chunk ends it.
    own: whether a query sees its own chunk; if not, it reads S, decayed up to it. decays: whether
    D is the decay; if not, it is 1.
    """

    def __init__(self, *, chunk: int, own: bool = True, decays: bool = True) -> None:
        super().__init__()
        self.chunk, self.own, self.decays = chunk, own, decays

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
        *,
        initial_state: Tensor | None = None,
        write: Tensor | None = None,
    ) -> Recurrent:
        """write: [batch, seq, heads], 0 to 1, equal for the tokens of a chunk; of its gradient the
        sum over a chunk is defined. None: all ones. initial_state enters at a chunk's start."""

    def response(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
        *,
        write: Tensor | None = None,
    ) -> Response:
        """As that of any recurrence, under these writes."""

        def run(values: Tensor, state: Tensor) -> Recurrent:
            tensors = q, k, values, log_decay, beta, info
            return self(*tensors, initial_state=state, write=write)

        return affine_response(run, k, v, self.transition)
