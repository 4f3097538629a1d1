"""What each scheme sends, predicted from integers: bytes that one rank receives per layer.

The closed forms hold for one document that fills all ranks under the zigzag layout, and are for
the rank that receives most of the message in question; without the causal mask that is every rank.
`planned` counts the same for one rank of any layout, on its own, without the plans that the schemes
make. Sums over ranks travel in fp32 or wider, everything else in the size of an activation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from models.sequence import Fragment
from parallel.shapes import ConvShape, LatentShape, RecurrenceShape, SoftmaxShape

Row = tuple[Fragment, ...]
Outer = Literal["ring", "gather"]


@dataclass(frozen=True)
class Bytes:
    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.forward + other.forward, self.backward + other.backward)


class Moved(NamedTuple):
    """Tokens of which a rank receives something."""

    keys: int = 0  # their keys and values, or latents
    again: int = 0  # the same in the backward
    grads: int = 0  # gradients of those


def moved(outer: Outer, *, tokens: int, ranks: int) -> Moved:
    """By ring or gather, of `tokens` a rank."""
    others = (ranks - 1) * tokens
    # The last hop of a ring stays where the backward starts.
    again = max(ranks - 2, 0) * tokens if outer == "ring" else others
    return Moved(others, again, others)


def planned(outer: Outer, peers: Sequence[Row], rank: int, *, causal: bool = True) -> Moved:
    """By ring or gather, on one rank of a layout."""
    ranks = len(peers)
    if outer == "gather":
        keys = sum(_seen(peers, owner, rank, causal) for owner in range(ranks) if owner != rank)
        grads = sum(_seen(peers, rank, reader, causal) for reader in range(ranks) if reader != rank)
        return Moved(keys, keys, grads)
    keys = sum(_carried(peers, rank, hop, causal) for hop in range(1, ranks))
    # Backward a rank gets from the next one what it had sent on.
    sent = [_carried(peers, (rank + 1) % ranks, hop, causal) for hop in range(1, ranks)]
    return Moved(keys, sum(sent[1:]), sum(sent))


def softmax_bytes(shape: SoftmaxShape, move: Moved, *, size: int) -> Bytes:
    """Of ring or gather; size: bytes of an activation."""
    backward = (move.again * size + move.grads * max(size, 4)) * shape.width
    return Bytes(round(shape.kept * move.keys * shape.width * size), round(shape.kept * backward))


def latent_bytes(shape: LatentShape, move: Moved, outer: Outer, *, size: int) -> Bytes:
    """Of ring or gather; the latter keeps the latents for the backward."""
    again = move.again if outer == "ring" else 0
    return Bytes(
        move.keys * shape.width * size,
        (again * size + move.grads * max(size, 4)) * shape.width,
    )


def softmax_heads_bytes(shape: SoftmaxShape, *, tokens: int, ranks: int, size: int) -> Bytes:
    """Of Ulysses over ranks that divide the key heads: queries, keys, values; outputs back."""
    width = shape.heads * (shape.dim + shape.v_dim) + shape.width
    one_way = tokens * width * size * (ranks - 1) // ranks
    return Bytes(one_way, one_way)


def latent_heads_bytes(shape: LatentShape, *, tokens: int, ranks: int, size: int) -> Bytes:
    """Of Ulysses over ranks that divide the heads: queries and outputs, and latents whole."""
    exchanged = tokens * shape.heads * (shape.dim + shape.v_dim) * size * (ranks - 1) // ranks
    latents = (ranks - 1) * tokens * shape.width
    return Bytes(exchanged + latents * size, exchanged + latents * max(size, 4))


def softmax_usp_bytes(
    shape: SoftmaxShape, outer: Outer, *, tokens: int, ranks: int, ulysses: int, size: int
) -> Bytes:
    """Ulysses over `ulysses` of the ranks, and ring or gather over the others for its heads."""
    inner = softmax_heads_bytes(shape, tokens=tokens, ranks=ulysses, size=size)
    # A ring of kept chunks takes them from their owners, in the backward too, as a gather does.
    outer = outer if shape.kept == 1 else "gather"
    # ulysses times the tokens for 1 / ulysses of the heads
    across = moved(outer, tokens=tokens, ranks=ranks // ulysses)
    return inner + softmax_bytes(shape, across, size=size)


def latent_usp_bytes(
    shape: LatentShape, outer: Outer, *, tokens: int, ranks: int, ulysses: int, size: int
) -> Bytes:
    inner = latent_heads_bytes(shape, tokens=tokens, ranks=ulysses, size=size)
    across = moved(outer, tokens=tokens * ulysses, ranks=ranks // ulysses)
    return inner + latent_bytes(shape, across, outer, size=size)


class Links(NamedTuple):
    """Summaries of runs that a rank receives."""

    transitions: int
    updates: int
    grads: int  # of states, in the backward


def links(ranks: int, *, scan: bool = False) -> Links:
    """All ranks but the last hold two runs, one of which follows all of the others'; at most so
    many by a scan, in rounds of doubling distance."""
    others = max(2 * ranks - 3, 0)
    if scan:
        others = 2 * (1 + others.bit_length())
    return Links(others, others, others)


def planned_links(peers: Sequence[Row], rank: int) -> Links:
    """On one rank of a layout, summaries being gathered: each goes to every later run's rank."""
    sent = [
        (holder, to, place)
        for holders in _chains(peers)
        for place, holder in enumerate(holders)
        for to in {*holders[place + 1 :]} - {holder}
    ]
    places = [place for _, to, place in sent if to == rank]
    grads = sum(holder == rank for holder, _, _ in sent)
    return Links(sum(place > 0 for place in places), len(places), grads)  # first: nothing enters


def states_bytes(shape: RecurrenceShape, links: Links, *, size: int) -> Bytes:
    """Of state passing, whatever the length of the runs."""
    state = shape.heads * shape.key_dim * shape.value_dim * max(size, 4)
    transition = shape.heads * shape.transition * max(size, 4)
    return Bytes(links.transitions * transition + links.updates * state, links.grads * state)


def state_heads_bytes(shape: RecurrenceShape, *, tokens: int, ranks: int, size: int) -> Bytes:
    """Of Ulysses: queries, keys and values in, outputs back; decays and write strengths in fp32
    or wider."""
    values = 2 * (shape.key_dim + shape.value_dim) * size + (shape.decays + 1) * max(size, 4)
    one_way = tokens * shape.heads * values * (ranks - 1) // ranks
    return Bytes(one_way, one_way)


def halo(ranks: int, *, reach: int) -> Moved:
    """A rank between the first and the last holds two runs that continue the document."""
    rows = (min(ranks, 3) - 1) * reach
    return Moved(rows, 0, rows)


def planned_halo(peers: Sequence[Row], rank: int, *, reach: int) -> Moved:
    """The `reach` tokens before each run of a rank, as far as they are of its document."""
    holder = {
        index: r
        for r, row in enumerate(peers)
        for f in row
        for index in range(f.index, f.index + f.length)
    }
    wanted = [
        (holder[start - lag], to)
        for to, row in enumerate(peers)
        for start, _, position in _runs(row)
        for lag in range(1, min(reach, position) + 1)
    ]
    keys = sum(to == rank != source for source, to in wanted)
    grads = sum(source == rank != to for source, to in wanted)
    return Moved(keys, 0, grads)


def halo_bytes(shape: ConvShape, move: Moved, *, size: int) -> Bytes:
    return Bytes(move.keys * shape.channels * size, move.grads * shape.channels * size)


def _seen(peers: Sequence[Row], owner: int, reader: int, causal: bool) -> int:
    """Tokens of the owner that some query of the reader sees."""
    return sum(key.length for key in peers[owner] if _sees(peers[reader], key, causal))


def _sees(row: Row, key: Fragment, causal: bool) -> bool:
    same = (f for f in row if f.start == key.start)
    return not key.padding and any(f.index > key.index or not causal for f in same)


def _carried(peers: Sequence[Row], rank: int, hop: int, causal: bool) -> int:
    """Tokens that reach a rank in this hop of a ring: those that it or a rank behind it sees."""
    ranks = len(peers)
    owner = (rank - hop) % ranks
    readers = [peers[(owner + further) % ranks] for further in range(hop, ranks)]
    return sum(key.length for key in peers[owner] if any(_sees(r, key, causal) for r in readers))


def _runs(row: Row) -> Iterator[tuple[int, int, int]]:
    """(index, document, position) of each first token of a run; padding is not of a document."""
    stop = None
    for f in row:
        if not f.padding and (f.index, f.start) != stop:
            yield f.index, f.start, f.position
        stop = f.index + f.length, f.start


def _chains(peers: Sequence[Row]) -> list[list[int]]:
    """The ranks of the runs of each document, in its order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for rank, row in enumerate(peers):
        for index, document, _ in _runs(row):
            found.setdefault(document, []).append((index, rank))
    return [[rank for _, rank in sorted(runs)] for runs in found.values()]
