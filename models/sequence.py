"""The seam between `models` and `parallel`: where tokens sit, and the operations across tokens.

Everything that lets one token see another goes through a `SequenceOp`: a module without parameters,
whose weights come as arguments. `parallel` replaces these modules and nothing else, so a mixer
reads the same on one core and on a thousand devices.

Shapes are [batch, seq, heads, dim]; `seq` is always local to this rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import ClassVar, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from models.precision import widen
from models.transition import DenseTransition, Transition


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of consecutive tokens of one document, as it lies in one local row."""

    length: int
    index: int  # of the first token, in the packed global sequence
    position: int = 0  # of the first token, inside its own document
    padding: bool = False

    @property
    def start(self) -> int:
        """Global index at which the document starts: equal for two fragments of one document."""
        return self.index - self.position


class Memo(dict):
    """What was derived from its owner, see `per_layout`. Copies and pickles of it are empty."""

    def __reduce__(self):
        return Memo, ()


class Layout(Protocol):
    """What owns a memo. Nothing in the memo may refer to the owner: the tensors in it are to be
    freed with the last reference to the owner, not when the garbage collector comes by."""

    @property
    def memo(self) -> Memo: ...


L = TypeVar("L", bound=Layout)
P = ParamSpec("P")
R = TypeVar("R")


def per_layout(plan: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """Calls `plan(layout, ...)` once for equal further arguments, and keeps what it returns as long
    as this object `layout` lives: all layers of a batch share it, and no other batch ever could."""

    @wraps(plan)
    def kept(layout: L, *args: P.args, **kwargs: P.kwargs) -> R:
        key = plan, args, *kwargs.items()
        if key not in layout.memo:
            layout.memo[key] = plan(layout, *args, **kwargs)
        return layout.memo[key]

    return kept


class Peers(tuple[tuple[Fragment, ...], ...]):
    """The one row of every context rank, and the plans that every layer derives from them."""

    def __init__(self, rows: Iterable[tuple[Fragment, ...]] = ()) -> None:
        self.memo = Memo()


@dataclass(frozen=True, eq=False)
class SequenceInfo:
    """Where each local token sits; every mask, reset and position derives from it.

    Query i sees key j iff both are of one document and index_j <= index_i; only a softmax op built
    with causal=False, and what is made of it, drops the second condition. The fragments are the
    host's copy of the same facts, for code that must know lengths without asking the device.
    """

    index: Tensor  # [batch, seq] int64, in the packed global sequence
    positions: Tensor  # [batch, seq] int64, inside the own document; 0 at a document start
    valid: Tensor  # [batch, seq] bool, False for padding
    fragments: tuple[tuple[Fragment, ...], ...]  # per row, tiling it from left to right
    # Under context parallelism, this rank's row included; else empty.
    peers: Peers = field(default_factory=Peers)
    memo: Memo = field(default_factory=Memo, init=False, repr=False)

    @classmethod
    def from_fragments(
        cls,
        rows: Sequence[Sequence[Fragment]],
        device: torch.device | str = "cpu",
        *,
        peers: Sequence[tuple[Fragment, ...]] = (),
    ) -> "SequenceInfo":
        """Raises ValueError unless every row holds the same, positive number of tokens."""
        lengths = {sum(fragment.length for fragment in row) for row in rows}
        if len(lengths) != 1 or min(lengths) <= 0:
            raise ValueError(f"rows must hold equally many tokens, got {sorted(lengths)}")

        def runs(row: Sequence[Fragment], first: str) -> Tensor:
            starts = (getattr(fragment, first) for fragment in row)
            return torch.cat(
                [torch.arange(s, s + f.length) for s, f in zip(starts, row, strict=True)]
            )

        valid = [torch.cat([torch.full((f.length,), not f.padding) for f in row]) for row in rows]
        return cls(
            index=torch.stack([runs(row, "index") for row in rows]).to(device),
            positions=torch.stack([runs(row, "position") for row in rows]).to(device),
            valid=torch.stack(valid).to(device),
            fragments=tuple(tuple(row) for row in rows),
            peers=Peers(peers),
        )

    @classmethod
    def from_lengths(
        cls,
        rows: Sequence[Sequence[int]],
        *,
        padding: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "SequenceInfo":
        """Whole documents of these lengths, row by row, then `padding[row]` tokens of padding."""
        tiled = []
        for i, row in enumerate(rows):
            fragments, index = [], 0
            for length in row:
                fragments.append(Fragment(length, index))
                index += length
            if padding is not None and padding[i]:
                fragments.append(Fragment(padding[i], index, padding=True))
            tiled.append(fragments)
        return cls.from_fragments(tiled, device)

    @classmethod
    def span(
        cls, batch: int, start: int, stop: int, device: torch.device | str = "cpu"
    ) -> "SequenceInfo":
        """Tokens start..stop of one document in every row: a prefix, or a step of decoding."""
        return cls.from_fragments([[Fragment(stop - start, start, start)]] * batch, device)

    def history(self, length: int) -> "SequenceInfo":
        """The `length` tokens that end with the last one here: the keys that a decoding step sees.

        Raises ValueError unless every row is the same stretch of one document, and that reaches
        back so far.
        """
        (first, *_), *_ = self.fragments
        stop = first.index + first.length
        if any(row != (first,) for row in self.fragments) or length > stop - first.start:
            raise ValueError("a cache holds one document in every row, of equal lengths")
        row = [Fragment(length, stop - length, stop - length - first.start)]
        return SequenceInfo.from_fragments([row] * self.shape[0], self.index.device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1]

    @property
    def starts(self) -> Tensor:
        """[batch, seq] bool: tokens before which their document has none in this row: at its start
        or, but for the first token of a row, behind a gap."""
        starts = self.positions == 0
        starts[:, 1:] |= self.index.diff() != 1
        return starts

    def to(self, device: torch.device | str) -> "SequenceInfo":
        """The same there. Plans are not shared: those on a device live as long as this copy."""
        return SequenceInfo(
            self.index.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.valid.to(device, non_blocking=True),
            self.fragments,
            Peers(self.peers),
        )

    def row(self, row: int) -> "SequenceInfo":
        """This row alone, as a batch of one."""
        one = slice(row, row + 1)
        return SequenceInfo(
            self.index[one], self.positions[one], self.valid[one], self.fragments[one]
        )

    def first(self, length: int) -> "SequenceInfo":
        """The first `length` tokens of every row; a document that reaches further is cut."""
        rows = []
        for row in self.fragments:
            kept, left = [], length
            for fragment in row:
                if left > 0:
                    kept.append(replace(fragment, length=min(fragment.length, left)))
                left -= fragment.length
            rows.append(tuple(kept))
        index, positions, valid = (x[:, :length] for x in (self.index, self.positions, self.valid))
        return SequenceInfo(index, positions, valid, tuple(rows))


class SequenceOp(nn.Module, ABC):
    """A parameter-free operation across tokens; its weights are arguments."""


class CausalConv(SequenceOp):
    """A depthwise causal convolution that never reaches over a document start."""

    @abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor, info: SequenceInfo, *, history: Tensor | None = None
    ) -> Tensor:
        """[batch, seq, channels] -> the same; weight [channels, width], newest tap last.

        history: [batch, width - 1, channels], the tokens just before the row; the first token sees
        as many of them as its position in its document allows. Absent, they are zero.
        """


class Visibility(NamedTuple):
    """Which key blocks a query of another block sees, per key head (token-level routing)."""

    query_block: Tensor  # [batch, seq] int64, block of each query in the packed global sequence
    key_block: Tensor  # [batch, key_seq] int64
    keep: Tensor  # [batch, key_seq, kv_heads] bool; False: seen by queries of its own block only


class SoftmaxAttention(SequenceOp):
    """Softmax attention inside documents: causal or, built with causal=False, of every token to all
    tokens of its document.

    Two further masks, `window` and `visibility`, are taken only by an implementation that lists
    them in `masks`: whoever builds a mixer that needs one checks it then, not at step 900.
    """

    masks: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        info: SequenceInfo,
        *,
        key_info: SequenceInfo | None = None,
        scale: float | None = None,
        window: int | None = None,
        visibility: Visibility | None = None,
    ) -> Tensor:
        """-> [batch, seq, heads, v_dim].

        q: [batch, seq, heads, dim]; k: [batch, key_seq, kv_heads, dim]; v: [..., kv_heads, v_dim];
        kv_heads divides heads; head h reads key head h // (heads // kv_heads). scale is
        dim^-0.5 unless given. key_info: where the keys sit, if not where the queries do.
        window: keys `window` indices away or more are not seen.
        """

    @abstractmethod
    def block(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, key_info: SequenceInfo, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Output over these keys alone, and its log-sum-exp [batch, seq, heads], natural log,
        fp32 or wider; where a query sees no key: 0 and -inf."""

    @abstractmethod
    def block_backward(
        self,
        grad_output: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        info: SequenceInfo,
        key_info: SequenceInfo,
        **kwargs,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) due to these keys, given output and lse over *all* keys."""


class LatentAttention(SequenceOp):
    """Attention over a low-rank latent: multi-head latent attention, arXiv 2405.04434.

    The up-projection is an argument, so that a scheme may move latents instead of keys and values;
    its gradient comes back like any other.
    """

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        latent: Tensor,
        shared_key: Tensor,
        up_weight: Tensor,
        info: SequenceInfo,
        *,
        key_info: SequenceInfo | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """-> [batch, seq, heads, v_dim].

        q: [batch, seq, heads, nope + rope], nope part first; latent: [batch, key_seq, rank],
        normalised; shared_key: [batch, key_seq, rope], one for all heads;
        up_weight: [heads, nope + v_dim, rank], the key part first.
        """


class Recurrent(NamedTuple):
    output: Tensor  # [batch, seq, heads, value_dim]
    final_state: Tensor  # [batch, heads, key_dim, value_dim], fp32 or wider


class Response(NamedTuple):
    """A row as an affine function of the state S that enters it, found before S is known.

    Its final state is T S + U, its output that of a zero state plus S^T reads; so the gradient of S
    is T^T grad_final plus the sum over tokens of reads grad_output^T. Only what `enter` returns has
    gradients.
    """

    reads: Tensor  # [batch, seq, heads, key_dim]
    transition: Transition  # T, fp32 or wider
    update: Tensor  # U, [batch, heads, key_dim, value_dim], fp32 or wider
    enter: Callable[[Tensor], Recurrent]  # what `forward` gives from this initial state


class LinearRecurrence(SequenceOp):
    """S_t = A_t S_{t-1} + B_t and o_t = S_t^T q_t: affine in the state, which is the contract.

    Where the row leaves a document the state is forgotten: at a document start, and behind a gap,
    which only a scheme that knows the other ranks can fill, one call per document. Hence a segment
    maps the state S that enters it to T S + U, see `response`, and segments compose.
    """

    transition: type[Transition] = DenseTransition  # the kind of T

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
    ) -> Recurrent:
        """q, k: [batch, seq, heads, key_dim]; v: [batch, seq, heads, value_dim];
        log_decay: as q, or [batch, seq, heads, 1], one for all channels; natural and <= 0;
        beta: [batch, seq, heads].

        initial_state [batch, heads, key_dim, value_dim] enters before the first token, which keeps
        it if its position is not 0. q comes scaled.
        """

    def response(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
    ) -> Response:
        """T is of the kind `transition`. This default serves every op."""

        def run(values: Tensor, state: Tensor) -> Recurrent:
            return self(q, k, values, log_decay, beta, info, initial_state=state)

        return affine_response(run, k, v, self.transition)


def affine_response(
    run: Callable[[Tensor, Tensor], Recurrent], k: Tensor, v: Tensor, kind: type[Transition]
) -> Response:
    """run: from the values and the state that enters.

    T and the reads are what comes of the identity where nothing is written, hence of columns of a
    state whose values are zero, here in front of those of v.
    """
    key_dim = k.shape[-1]
    with torch.no_grad():
        values = torch.cat((v.new_zeros(k.shape), v), dim=-1)
        eye = torch.eye(key_dim, values.shape[-1], device=v.device).to(widen(v[:0]))
        output, final = run(values, eye.expand(k.shape[0], k.shape[2], -1, -1))
    transition = kind.of_matrix(final[..., :key_dim])
    reads = output[..., :key_dim].clone()
    return Response(reads, transition, final[..., key_dim:], lambda state: run(v, state))
