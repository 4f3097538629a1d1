"""What a scheme must know of an operation to say what it would send: heads and widths."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor, nn

from models.ops.routed import RoutedAttention
from models.sequence import (
    CausalConv,
    LatentAttention,
    LinearRecurrence,
    Recurrent,
    SequenceOp,
    SoftmaxAttention,
)

# Of the chunks of routed attention; trained heads of NAtS-L keep 0.25 to 0.4, arXiv 2602.03681.
KEPT = 0.35


@dataclass(frozen=True, kw_only=True)
class SoftmaxShape:
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    kept: float = 1  # share of the keys and values that later tokens see
    shared: bool = False  # the keys are the values too

    @property
    def width(self) -> int:
        """Values of a token's keys and values, as they travel."""
        return self.kv_heads * (self.dim + (0 if self.shared else self.v_dim))


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    heads: int
    dim: int  # of a query: nope + rope
    rope: int
    v_dim: int
    rank: int

    @property
    def width(self) -> int:
        """Values of a token that travel instead of its keys and values."""
        return self.rank + self.rope

    @property
    def expanded(self) -> int:
        """Values of a token that the latent is projected up to, all heads together."""
        return self.heads * (self.dim - self.rope + self.v_dim)


@dataclass(frozen=True, kw_only=True)
class RecurrenceShape:
    heads: int
    key_dim: int
    value_dim: int
    decays: int  # of one head: as many as key channels, or 1
    transition: int  # values of one head's transition


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    channels: int
    width: int


Shape = SoftmaxShape | LatentShape | RecurrenceShape | ConvShape


def record_shapes(module: nn.Module, run: Callable[[], object]) -> set[Shape]:
    """Shapes of the operations that `run` calls inside `module`.

    The operations are not computed but return tensors without values, so that the module may be one
    without memory. They stay replaced: it is of no other use any more.
    """
    found: set[Shape] = set()
    for op in module.modules():
        for contract, record in _RECORDS.items():
            if isinstance(op, contract):
                setattr(op, "forward", partial(record, op, found))  # noqa: B010, of an instance
    run()
    return found


def _softmax(
    op: SequenceOp, found: set, q: Tensor, k: Tensor, v: Tensor | None, *_, kept: float = 1, **__
) -> Tensor:
    (heads, dim), (kv_heads, v_dim) = q.shape[2:], (k if v is None else v).shape[2:]
    shape = SoftmaxShape(
        heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, kept=kept, shared=v is None
    )
    found.add(shape)
    return q.new_empty(*q.shape[:3], v_dim)


def _latent(
    op: SequenceOp,
    found: set,
    q: Tensor,
    latent: Tensor,
    shared_key: Tensor,
    up_weight: Tensor,
    *_,
    **__,
) -> Tensor:
    heads, dim = q.shape[2:]
    rope, rank = shared_key.shape[2], latent.shape[2]
    v_dim = up_weight.shape[1] - (dim - rope)
    found.add(LatentShape(heads=heads, dim=dim, rope=rope, v_dim=v_dim, rank=rank))
    return q.new_empty(*q.shape[:3], v_dim)


def _recurrence(
    op: LinearRecurrence, found: set, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *_, **__
) -> Recurrent:
    batch, (heads, key_dim) = len(k), k.shape[2:]
    shape = RecurrenceShape(
        heads=heads,
        key_dim=key_dim,
        value_dim=v.shape[3],
        decays=log_decay.shape[3],
        transition=prod(op.transition.shape(key_dim)),
    )
    found.add(shape)
    return Recurrent(v.new_empty(v.shape), v.new_empty(batch, heads, key_dim, v.shape[3]))


def _conv(op: SequenceOp, found: set, x: Tensor, weight: Tensor, *_, **__) -> Tensor:
    channels, width = weight.shape
    found.add(ConvShape(channels=channels, width=width))
    return x.new_empty(x.shape)


_RECORDS: dict[type[SequenceOp], Callable] = {
    SoftmaxAttention: _softmax,
    RoutedAttention: partial(_softmax, kept=KEPT),
    LatentAttention: _latent,
    LinearRecurrence: _recurrence,
    CausalConv: _conv,
}
