"""The balanced layout: documents whole on a rank where they fit, the rest cut to even the work.

Ranks hold equally many tokens. Subject to that, as few tokens as possible are in documents that are
cut, and then the softmax area is even and fragments are few: a document on one rank sends nothing
at all, and a recurrence sends a state per fragment. Finding the fewest is bin packing; two greedy
orders and exchanges between documents get close. Where that leaves a rank with much more attention
than the others, which wait for it, the longest documents are cut although they fit, in shares that
are packed as if they were documents: not too small, as each costs the states of those before it.

A rank takes two pieces of a long document, as many tokens as whole documents left it room for. Of
mirrored pieces, the zigzag, its share of the area is that of the tokens; a rank with more work than
others takes more of them from the start of the document, where a token sees little.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from models.sequence import Fragment

# A cut document of less than this part of a rank's area stays in as few runs as possible: it moves
# the balance by 3% at most, which is not worth the fragments of a zigzag.
_SMALL = 32
# Pairs of tokens that a rank may have above the mean before a document that fits is cut for it. In
# 32 heads of 192 and 128 they are 0.7 TFLOP, in the time of which a rank receives a tenth of a GB:
# some twenty states, which is what recurrences send where a few documents are cut.
_UNEVEN = 2**25
# Tokens of a share of such a document: with smaller ones, more states would travel.
_SHARE = 4096


class _Item(NamedTuple):
    """What goes on one rank if it fits: a document, or a share of one."""

    fragments: tuple[Fragment, ...]
    length: int
    squares: int  # twice the area: of a document, its length squared


Cost = tuple[int, int, int, int]  # the smaller, the better


class _Bins:
    """Items by rank, in order of length, and the tokens that each rank has left."""

    def __init__(self, ranks: int, size: int) -> None:
        self.held: list[list[_Item]] = [[] for _ in range(ranks)]
        self.room = [size] * ranks
        self.squares = [0] * ranks

    def with_room(self, length: int) -> list[int]:
        return [rank for rank, room in enumerate(self.room) if room >= length]

    def put(self, rank: int, item: _Item) -> None:
        insort(self.held[rank], item, key=_length)
        self._count(rank, item, 1)

    def take(self, rank: int, place: int) -> _Item:
        item = self.held[rank].pop(place)
        self._count(rank, item, -1)
        return item

    def _count(self, rank: int, item: _Item, sign: int) -> None:
        self.room[rank] -= sign * item.length
        self.squares[rank] += sign * item.squares


Choice = Callable[[_Bins, _Item], int]  # the rank, of those with room


def balance(
    documents: Sequence[Fragment], tokens: int, ranks: int, multiple: int
) -> list[list[Fragment]]:
    """-> fragments by rank, in no order; no rank holds more than its part of `tokens`, or, where
    `multiple` leaves gaps, a few multiples beyond it."""
    ordered = sorted(documents, key=lambda d: (-d.length, d.index))
    size = -(-tokens // ranks)
    size += -size % multiple
    while True:
        rows = _balance(ordered, ranks, size, multiple)
        if rows is not None:
            return rows
        size += multiple


def _balance(
    ordered: Sequence[Fragment], ranks: int, size: int, multiple: int
) -> list[list[Fragment]] | None:
    """With the longest documents cut, as few of them as it takes; None if there is no room."""
    plans: list[tuple[Cost, list[list[Fragment]]]] = []
    over = sum(document.length > size for document in ordered)
    last = max(over, sum(document.length > _SHARE for document in ordered))
    cut = [_item([document]) for document in ordered[:over]]
    shared = over
    while True:
        shares = [share for d in ordered[over:shared] for share in _shares(d, multiple)]
        items = shares + [_item([document]) for document in ordered[shared:]]
        items.sort(key=lambda item: (-item.squares, item.fragments[0].index))
        for choose in (_even_area(cut), _tightest):
            bins, left = _pack(items, ranks, size, choose)
            rows = _cut_up(cut + left, bins, multiple)
            if rows is not None:
                plans.append((_cost(rows), rows))
        if not plans:
            return None
        (uneven, *_), rows = min(plans, key=lambda plan: plan[0])
        if not uneven or shared == last:
            return rows
        shared = min(shared + 1 + (shared - over) // 2, last)


def _length(item: _Item) -> int:
    return item.length


def _shares(document: Fragment, multiple: int) -> list[_Item]:
    """Of equal area: each of two mirrored pieces."""
    count = -(-document.length // _SHARE)
    units = -(-document.length // multiple)
    bounds = [units * i // (2 * count) * multiple for i in range(2 * count)] + [document.length]
    pieces = [
        replace(document, length=end - start, index=document.index + start, position=start)
        for start, end in pairwise(bounds)
    ]
    pairs = [[f for f in (pieces[i], pieces[-1 - i]) if f.length] for i in range(count)]
    return [_item(pair) for pair in pairs if pair]


def _item(fragments: Sequence[Fragment]) -> _Item:
    length = sum(fragment.length for fragment in fragments)
    return _Item(tuple(fragments), length, sum(_square(f.position, f.length) for f in fragments))


def _cost(rows: list[list[Fragment]]) -> Cost:
    """Twice the area that is too uneven, tokens in cut documents, twice the largest area,
    fragments."""
    areas = [sum(_square(f.position, f.length) for f in row) for row in rows]
    uneven = max(areas) - sum(areas) // len(areas) - 2 * _UNEVEN
    homes: dict[int, set[int]] = {}
    for rank, row in enumerate(rows):
        for fragment in row:
            homes.setdefault(fragment.start, set()).add(rank)
    cut = sum(f.length for row in rows for f in row if len(homes[f.start]) > 1)
    return max(uneven, 0), cut, max(areas), sum(map(len, rows))


def _tightest(bins: _Bins, item: _Item) -> int:
    return min(bins.with_room(item.length), key=lambda rank: bins.room[rank])


def _even_area(long: Sequence[_Item]) -> Choice:
    """Evens what the areas will be once long documents, which no rank can hold, have filled the
    room.

    A token of those adds sum(length^2) / sum(length) to twice the area, in the mean.
    """
    tokens, squares = max(sum(map(_length, long)), 1), sum(item.squares for item in long)

    def choose(bins: _Bins, item: _Item) -> int:
        # It takes the place of tokens that cost more, or less.
        sign = 1 if item.squares * tokens >= squares * item.length else -1

        def key(rank: int) -> tuple[int, int]:
            ahead = bins.squares[rank] * tokens + bins.room[rank] * squares
            return sign * ahead, -bins.room[rank]

        return min(bins.with_room(item.length), key=key)

    return choose


def _pack(
    items: Sequence[_Item], ranks: int, size: int, choose: Choice
) -> tuple[_Bins, list[_Item]]:
    """Items in ranks of `size` tokens, and those that remain."""
    bins = _Bins(ranks, size)
    left = []
    for item in items:
        if max(bins.room) >= item.length:
            bins.put(choose(bins, item), item)
        else:
            left.append(item)
    return _settle(bins, left)


def _settle(bins: _Bins, left: list[_Item]) -> tuple[_Bins, list[_Item]]:
    """Items that remain change places with shorter ones until that brings nothing any more."""
    pending, left = left, []
    while pending:
        item = pending.pop()
        fitting = bins.with_room(item.length)
        if fitting:
            bins.put(min(fitting, key=lambda rank: bins.room[rank]), item)
            continue
        shorter = _exchange(item, bins)
        (left if shorter is item else pending).append(shorter)
    return bins, sorted(left, key=lambda item: (-item.squares, item.fragments[0].index))


def _exchange(item: _Item, bins: _Bins) -> _Item:
    """Puts the item in the place of a shorter one, of the shortest that leaves enough room; -> what
    has no place then."""
    places = []
    for rank, (held, room) in enumerate(zip(bins.held, bins.room, strict=True)):
        place = bisect_left(held, item.length - room, key=_length)
        if place < len(held) and held[place].length < item.length:
            places.append((held[place].length, rank, place))
    if not places:
        return item
    _, rank, place = min(places)
    shorter = bins.take(rank, place)
    bins.put(rank, item)
    return shorter


def _cut_up(cut: list[_Item], bins: _Bins, multiple: int) -> list[list[Fragment]] | None:
    """The rows, the room filled with pieces of what has no place; None if it is too little."""
    if sum(_units(item, multiple) for item in cut) > sum(r // multiple for r in bins.room):
        return None
    squares = sum(bins.squares) + sum(item.squares for item in cut)
    rows = _Rows(bins, multiple)
    large = []
    for item in cut:
        if len(item.fragments) == 1 and item.squares * len(bins.room) * _SMALL > squares:
            large.append(item)
        else:
            rows.put(item, _few(_units(item, multiple), rows.room))
    ahead = _ahead(rows, sum(_units(item, multiple) ** 2 for item in large))
    for item in large:
        rows.put(item, _zigzag(_units(item, multiple), rows.room, ahead))
    return rows.held


class _Rows:
    """Fragments by rank, and what each rank has left and works, in units of `multiple` tokens."""

    def __init__(self, bins: _Bins, multiple: int) -> None:
        self.held = [[f for item in held for f in item.fragments] for held in bins.held]
        self.room = [tokens // multiple for tokens in bins.room]
        self.squares = [squares // multiple**2 for squares in bins.squares]
        self.multiple = multiple

    def put(self, item: _Item, pieces: list[tuple[int, int]]) -> None:
        """(rank, units), from its start on."""
        left = list(item.fragments)
        for rank, count in pieces:
            self.room[rank] -= count
            taken = 0
            while left and taken < count:
                whole = left.pop(0)
                length = min((count - taken) * self.multiple, whole.length)
                piece, rest = _split(whole, length)
                self.held[rank].append(piece)
                self.squares[rank] += _square(piece.position, length) // self.multiple**2
                taken += -(-length // self.multiple)
                left[:0] = rest


def _split(fragment: Fragment, length: int) -> tuple[Fragment, list[Fragment]]:
    """Its first so many tokens, and what is left of it."""
    first, left = replace(fragment, length=length), fragment.length - length
    if not left:
        return first, []
    index, position = fragment.index + length, fragment.position + length
    return first, [replace(fragment, length=left, index=index, position=position)]


def _square(position: int, length: int) -> int:
    """Twice the area."""
    return length * (2 * position + length)


def _ahead(rows: _Rows, squares: int) -> list[float]:
    """By rank, twice the area above the mean once documents of that in all have filled the room,
    each rank with its share of every document."""
    room = max(sum(rows.room), 1)
    mean = (sum(rows.squares) + squares) / len(rows.room)
    return [
        held + squares * free / room - mean
        for held, free in zip(rows.squares, rows.room, strict=True)
    ]


def _units(item: _Item, multiple: int) -> int:
    return sum(-(-fragment.length // multiple) for fragment in item.fragments)


def _zigzag(units: int, room: list[int], ahead: list[float]) -> list[tuple[int, int]]:
    """(rank, units), from the document's start on: by its room, a rank takes a piece from either
    end of what others have left, the more from the early end the more its work is ahead.

    Takes from `ahead` what it evens.
    """
    front, back, first, last = [], [], 0, units
    shares = _proportional(units, room)
    for rank in sorted(range(len(room)), key=lambda rank: (-abs(ahead[rank]), rank)):
        share, left = shares[rank], last - first
        wanted = units * share - ahead[rank]
        early = share
        if share < left:
            # Linear in it: `early` units at the front and the others at the back.
            early = round((_square(first + left - share, share) - wanted) / (2 * (left - share)))
            early = min(max(early, 0), share)
        late = share - early
        got = _square(first, early) + _square(last - late, late)
        ahead[rank] += got - units * share
        front.append((rank, early))
        back.append((rank, late))
        first, last = first + early, last - late
    return front + back[::-1]


def _proportional(units: int, room: list[int]) -> list[int]:
    """By rank, in proportion to the room."""
    shares = [units * free // sum(room) for free in room]
    # Rounding left fewer units than there are ranks with more room than share.
    by_rest = sorted(range(len(room)), key=lambda rank: (-(units * room[rank] % sum(room)), rank))
    for rank in by_rest[: units - sum(shares)]:
        shares[rank] += 1
    return shares


def _few(units: int, room: list[int]) -> list[tuple[int, int]]:
    """(rank, units), from the document's start on: in as few runs as there can be."""
    pieces = []
    free = list(room)
    while units:
        enough = [rank for rank, tokens in enumerate(free) if tokens >= units]
        rank = min(enough, key=free.__getitem__) if enough else free.index(max(free))
        count = min(units, free[rank])
        pieces.append((rank, count))
        free[rank] -= count
        units -= count
    return pieces
