"""States handed along the chain of a cut document's fragments, and their gradients handed back.

Link i of a chain maps the state that enters it to T_i S + U_i, so the states that enter the links
are linear in the updates U. Both ways to compute them, `Gather` and `Scan`, send (T, U) forward.
Backward they are transposed with the T that each rank kept: K x V numbers travel, never a T.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.runs import runs
from models.sequence import Peers, SequenceInfo, per_layout
from models.transition import Transition
from parallel.collectives import Axis
from parallel.plans import own_rank, rank_on


class Link(NamedTuple):
    """A run of tokens of a document of several runs, in the order of the document."""

    document: int  # `Fragment.start`
    place: int


class Summary(NamedTuple):
    transition: Transition | None  # None where nothing enters: the document starts in the segment
    update: Tensor  # [1, heads, key_dim, value_dim]


class Parcel(NamedTuple):
    """What one rank knows of a link and another needs."""

    source: int
    to: int
    link: Link
    transition: bool  # whether it travels with the update


class Route(NamedTuple):
    """What one rank does with some parcels. Where none leaves its rank, no rank sends."""

    outgoing: tuple[Parcel, ...]  # by the rank that they go to
    incoming: tuple[Parcel, ...]  # by the rank that they come from
    staying: tuple[Link, ...]
    crosses: bool

    @classmethod
    def of(cls, parcels: Sequence[Parcel], rank: int, *, back: bool = False) -> "Route":
        """back: every parcel returns to its source, and without a transition."""
        if back:
            parcels = [Parcel(p.to, p.source, p.link, False) for p in parcels]
        crossing = [p for p in parcels if p.source != p.to]
        return cls(
            tuple(sorted((p for p in crossing if p.source == rank), key=lambda p: p.to)),
            tuple(sorted((p for p in crossing if p.to == rank), key=lambda p: p.source)),
            tuple(p.link for p in parcels if p.source == p.to == rank),
            bool(crossing),
        )


Routes = tuple[Route, Route]  # forward and back
Kept = dict[tuple, Tensor]


@per_layout
def chains(peers: Peers) -> dict[int, tuple[int, ...]]:
    """The rank of every link, for each document that is not one run on one rank.

    Raises ValueError where runs do not make up a document from its start without a gap.
    """
    found = defaultdict(list)
    for rank, row in enumerate(peers):
        padding = {fragment.start for fragment in row if fragment.padding}
        for run in runs(row):
            if run.document not in padding:
                found[run.document].append((run.position, run.stop - run.start, rank))
    for document, links in found.items():
        links.sort()
        position = 0
        for start, length, _ in links:
            if start != position:
                raise ValueError(
                    f"the document at index {document} goes on at position {start} after "
                    f"{position} tokens; the fragments of all context ranks must make it up"
                )
            position += length
    return {d: tuple(x[2] for x in found[d]) for d in sorted(found) if len(found[d]) > 1}


def place_on(axis: Axis, info: SequenceInfo) -> int | None:
    """This rank among those that hold the sequence; None where there is no chain on any.

    Raises ValueError unless they are the ranks of the axis.
    """
    own_rank(info)
    return rank_on(axis, info) if chains(info.peers) else None


@dataclass(frozen=True)
class Post:
    """Sends summaries of one kind and size along an axis."""

    axis: Axis
    kind: type[Transition]
    state: Tensor  # of the shape, dtype and device of every state

    def send(
        self, route: Route, contents: dict[Link, Summary], direction: str
    ) -> Callable[[], Iterator[tuple[Link, Summary]]]:
        """One message to each rank, posted now; the call that it returns waits for what comes.

        What stays here comes first, the rest by rank.
        """
        sent, received = [0] * self.axis.ranks, [0] * self.axis.ranks
        for parcel in route.outgoing:
            sent[parcel.to] += self._size(parcel)
        for parcel in route.incoming:
            received[parcel.source] += self._size(parcel)
        pending = None
        if route.crosses:
            pieces = [piece for parcel in route.outgoing for piece in self._pack(parcel, contents)]
            message = torch.cat([self.state.new_empty(0), *pieces])
            words = {"op": "recurrence", "direction": direction}
            pending = self.axis.exchange(message, sent, received, **words)

        def wait() -> Iterator[tuple[Link, Summary]]:
            yield from ((link, contents[link]) for link in route.staying)
            if pending is not None:
                pieces = pending.wait().split([self._size(parcel) for parcel in route.incoming])
                for parcel, piece in zip(route.incoming, pieces, strict=True):
                    yield parcel.link, self._unpack(parcel, piece)

        return wait

    def _transition_shape(self) -> tuple[int, ...]:
        return *self.state.shape[:2], *self.kind.shape(self.state.shape[2])

    def _size(self, parcel: Parcel) -> int:
        return parcel.transition * prod(self._transition_shape()) + self.state.numel()

    def _pack(self, parcel: Parcel, contents: dict[Link, Summary]) -> Iterator[Tensor]:
        transition, update = contents[parcel.link]
        if parcel.transition:
            assert transition is not None
            yield transition.tensor.flatten()
        yield update.flatten()

    def _unpack(self, parcel: Parcel, piece: Tensor) -> Summary:
        first = piece.numel() - self.state.numel()
        update = piece[first:].view(self.state.shape)
        if not parcel.transition:
            return Summary(None, update)
        return Summary(self.kind(piece[:first].view(self._transition_shape())), update)


class Chain(ABC):
    """One pass of states over the chains and one of gradients back, each started and awaited.

    Every rank makes the same calls. Transitions are returned and taken as tensors by key, so that
    autograd keeps them.
    """

    post: Post
    _wait: Callable[[], Iterator[tuple[Link, Summary]]]

    @abstractmethod
    def start(self, summaries: dict[Link, Summary]) -> None:
        """Posts those of this rank's links that another follows."""

    @abstractmethod
    def states(self) -> tuple[dict[Link, Tensor], Kept]:
        """The states that enter this rank's links but the first, and what `start_back` takes."""

    @abstractmethod
    def start_back(self, grads: dict[Link, Tensor], kept: Kept) -> None:
        """Posts the gradients of `states`, each with that of the state that leaves its link
        taken as zero."""

    def gradients(self) -> dict[Link, Tensor]:
        """The full gradients of the states that leave this rank's links but the last."""
        total: dict[Link, Tensor] = {}
        for link, (_, grad) in self._arrived():
            total[link] = total[link] + grad if link in total else grad
        return total

    def _arrived(self) -> Iterator[tuple[Link, Summary]]:
        wait = self._wait
        del self._wait  # with all that was sent
        yield from wait()


class Gather(Chain):
    """Every rank gets all summaries before its last link, and composes them itself."""

    def __init__(self, post: Post, peers: Peers) -> None:
        self.post = post
        self.forward, self.back = gather_routes(peers, post.axis.rank)
        self.links = gathered_links(peers, post.axis.rank)

    def start(self, summaries: dict[Link, Summary]) -> None:
        self._wait = self.post.send(self.forward, summaries, "forward")

    def states(self) -> tuple[dict[Link, Tensor], Kept]:
        summaries = dict(self._arrived())
        states: dict[Link, Tensor] = {}
        kept: Kept = {}
        state = self.post.state
        for link, follows in self.links:
            transition, update = summaries[link]
            if transition is None:
                state = update.clone()  # not the whole message
            else:
                state = transition.apply(state) + update
                kept[link] = transition.tensor.clone()
            if follows:
                states[_shifted(link, 1)] = state
        return states, kept

    def start_back(self, grads: dict[Link, Tensor], kept: Kept) -> None:
        contents: dict[Link, Summary] = {}
        grad = self.post.state
        for link, follows in reversed(self.links):
            after = _shifted(link, 1)
            if after in contents:
                grad = self.post.kind(kept[after]).adjoint(grad)
                grad = grad + grads[after] if follows else grad
            else:  # this rank's last link
                grad = grads[after]
            contents[link] = Summary(None, grad)
        self._wait = self.post.send(self.back, contents, "backward")


class Scan(Chain):
    """Windows of doubling length (Hillis and Steele): log2 of the links in rounds, one summary a
    link in each. The window of a link ends just before it; one that reaches the start of the
    document is a state."""

    def __init__(self, post: Post, peers: Peers) -> None:
        self.post = post
        self.first, *self.rounds = scan_routes(peers, post.axis.rank)

    def start(self, summaries: dict[Link, Summary]) -> None:
        self._wait = self.post.send(self.first[0], summaries, "forward")

    def states(self) -> tuple[dict[Link, Tensor], Kept]:
        windows = {_shifted(link, 1): summary for link, summary in self._arrived()}
        kept: Kept = {}
        for i, (forward, _) in enumerate(self.rounds):
            arrived = self.post.send(forward, dict(windows), "forward")
            for link, (transition, update) in arrived():
                link = _shifted(link, 2**i)
                later = windows[link]
                assert later.transition is not None
                kept[i, *link] = later.transition.tensor.clone()
                composed = transition and later.transition.compose(transition)
                windows[link] = Summary(composed, later.transition.apply(update) + later.update)
        return {link: window.update.clone() for link, window in windows.items()}, kept

    def start_back(self, grads: dict[Link, Tensor], kept: Kept) -> None:
        grads = dict(grads)
        for i, (_, back) in reversed([*enumerate(self.rounds)]):
            contents = {
                _shifted(link, -(2**i)): Summary(None, self.post.kind(kept[i, *link]).adjoint(grad))
                for link, grad in grads.items()
                if (i, *link) in kept
            }
            for link, (_, grad) in self.post.send(back, contents, "backward")():
                grads[link] = grads[link] + grad
        contents = {_shifted(link, -1): Summary(None, grad) for link, grad in grads.items()}
        self._wait = self.post.send(self.first[1], contents, "backward")


def _shifted(link: Link, places: int) -> Link:
    return Link(link.document, link.place + places)


@per_layout
def gather_routes(peers: Peers, rank: int) -> Routes:
    """Of each link to every rank that holds a later one of its document."""
    parcels = [
        Parcel(source, to, Link(document, place), place > 0)
        for document, ranks in chains(peers).items()
        for place, source in enumerate(ranks)
        for to in sorted(set(ranks[place + 1 :]))
    ]
    return Route.of(parcels, rank), Route.of(parcels, rank, back=True)


@per_layout
def gathered_links(peers: Peers, rank: int) -> tuple[tuple[Link, bool], ...]:
    """All links before the last of this rank, and whether this rank holds the next one."""
    found = []
    for document, ranks in chains(peers).items():
        last = max((place for place, holder in enumerate(ranks) if holder == rank), default=0)
        found += [(Link(document, place), ranks[place + 1] == rank) for place in range(last)]
    return tuple(found)


@per_layout
def scan_routes(peers: Peers, rank: int) -> tuple[Routes, ...]:
    """First of each link to the next; then of the window of each to that 1, 2, 4, ... later."""

    def moves(first: int, distance: int, states: int) -> Routes:
        """The first `states` places send a state, which nothing enters."""
        parcels = [
            Parcel(ranks[place], ranks[place + distance], Link(document, place), place > states)
            for document, ranks in chains(peers).items()
            for place in range(first, len(ranks) - distance)
        ]
        return Route.of(parcels, rank), Route.of(parcels, rank, back=True)

    longest = max((len(ranks) for ranks in chains(peers).values()), default=0)
    rounds, distance = [moves(0, 1, 0)], 1
    while distance < longest - 1:
        rounds.append(moves(1, distance, distance))
        distance *= 2
    return tuple(rounds)
