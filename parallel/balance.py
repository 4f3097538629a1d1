"""The balanced layout: documents whole on a rank where they fit, the rest cut to even the work.

Ranks hold equally many tokens. Subject to that, as few tokens as possible are in documents that are
cut, and then the softmax area is even and fragments are few: a document on one rank sends nothing
at all, and a recurrence sends a state per fragment. Finding the fewest is bin packing; two greedy
orders and exchanges between documents get close. Where that leaves a rank with much more attention
than the others, which wait for it, the longest documents are cut although they fit.

A rank takes two pieces of a long document, as many tokens as whole documents left it room for. Of
mirrored pieces, the zigzag, its share of the area is that of the tokens; a rank with more work than
others takes more of them from the start of the document, where a token sees little.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import replace

from models.sequence import Fragment

# A cut document of less than this part of a rank's area stays in as few runs as possible: it moves
# the balance by 3% at most, which is not worth the fragments of a zigzag.
_SMALL = 32
# Tokens that the mean token of a rank may see more than that of all ranks before a document is cut
# for it: in a layer of width 2,048 that is 8% of the work for a token (4 x 1,024 of 24 x 2,048).
_UNEVEN = 1024


Cost = tuple[int, int, int, int]  # the smaller, the better


class _Bins:
    """Whole documents by rank, in order of length, and the tokens that each rank has left."""

    def __init__(self, ranks: int, size: int) -> None:
        self.held: list[list[Fragment]] = [[] for _ in range(ranks)]
        self.room = [size] * ranks
        self.squares = [0] * ranks  # of the lengths: twice the area

    def with_room(self, length: int) -> list[int]:
        return [rank for rank, room in enumerate(self.room) if room >= length]

    def put(self, rank: int, document: Fragment) -> None:
        insort(self.held[rank], document, key=_length)
        self._count(rank, document, 1)

    def take(self, rank: int, place: int) -> Fragment:
        document = self.held[rank].pop(place)
        self._count(rank, document, -1)
        return document

    def _count(self, rank: int, document: Fragment, sign: int) -> None:
        self.room[rank] -= sign * document.length
        self.squares[rank] += sign * document.length**2


Choice = Callable[[_Bins, int], int]  # the rank, of those with room, for a document of this length


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
    long = sum(document.length > size for document in ordered)
    # In a document of twice that length the mean token sees no more.
    last = max(long, sum(document.length > 2 * _UNEVEN for document in ordered))
    while True:
        for choose in (_even_area(ordered[:long]), _tightest):
            bins, cut = _pack(ordered[long:], ranks, size, choose)
            cut = [*ordered[:long], *cut]
            rows = _cut_up(cut, bins, multiple)
            if rows is not None:
                plans.append((_cost(cut, rows, size), rows))
        if not plans:
            return None
        (uneven, *_), rows = min(plans, key=lambda plan: plan[0])
        if not uneven or long == last:
            return rows
        long = min(long + 1 + long // 2, last)


def _length(document: Fragment) -> int:
    return document.length


def _cost(cut: list[Fragment], rows: list[list[Fragment]], size: int) -> Cost:
    """Twice the area that is too uneven, tokens in cut documents, twice the largest area,
    fragments."""
    areas = [sum(_square(f.position, f.length) for f in row) for row in rows]
    uneven = max(areas) - sum(areas) // len(areas) - 2 * _UNEVEN * size
    return max(uneven, 0), sum(map(_length, cut)), max(areas), sum(map(len, rows))


def _tightest(bins: _Bins, length: int) -> int:
    return min(bins.with_room(length), key=lambda rank: bins.room[rank])


def _even_area(long: Sequence[Fragment]) -> Choice:
    """Evens what the areas will be once long documents, which are to be cut, have filled the room.

    A token of those adds sum(length^2) / sum(length) to twice the area, in the mean.
    """
    lengths = [document.length for document in long]
    tokens, squares = max(sum(lengths), 1), sum(length**2 for length in lengths)
    # A whole document takes the place of tokens that cost more, if there are any.
    sign = -1 if long else 1

    def choose(bins: _Bins, length: int) -> int:
        def key(rank: int) -> tuple[int, int]:
            ahead = bins.squares[rank] * tokens + bins.room[rank] * squares
            return sign * ahead, -bins.room[rank]

        return min(bins.with_room(length), key=key)

    return choose


def _pack(
    ordered: Sequence[Fragment], ranks: int, size: int, choose: Choice
) -> tuple[_Bins, list[Fragment]]:
    """Whole documents in ranks of `size` tokens, and the documents that remain, longest first."""
    bins = _Bins(ranks, size)
    cut = []
    for document in ordered:
        if max(bins.room) >= document.length:
            bins.put(choose(bins, document.length), document)
        else:
            cut.append(document)
    return _settle(bins, cut)


def _settle(bins: _Bins, cut: list[Fragment]) -> tuple[_Bins, list[Fragment]]:
    """Documents to cut change places with shorter ones until that brings nothing any more."""
    pending, cut = cut, []
    while pending:
        document = pending.pop()
        fitting = bins.with_room(document.length)
        if fitting:
            bins.put(min(fitting, key=lambda rank: bins.room[rank]), document)
            continue
        shorter = _exchange(document, bins)
        (cut if shorter is document else pending).append(shorter)
    return bins, sorted(cut, key=lambda d: (-d.length, d.index))


def _exchange(document: Fragment, bins: _Bins) -> Fragment:
    """Puts the document in the place of a shorter one, of the shortest that leaves enough room;
    -> what has no place then."""
    places = []
    for rank, (held, room) in enumerate(zip(bins.held, bins.room, strict=True)):
        place = bisect_left(held, document.length - room, key=_length)
        if place < len(held) and held[place].length < document.length:
            places.append((held[place].length, rank, place))
    if not places:
        return document
    _, rank, place = min(places)
    shorter = bins.take(rank, place)
    bins.put(rank, document)
    return shorter


def _cut_up(cut: list[Fragment], bins: _Bins, multiple: int) -> list[list[Fragment]] | None:
    """The rows, the room filled with pieces of the documents to cut; None if it is too little."""
    if sum(_units(document, multiple) for document in cut) > sum(r // multiple for r in bins.room):
        return None
    squares = sum(bins.squares) + sum(document.length**2 for document in cut)
    rows = _Rows(bins, multiple)
    small = [d for d in cut if d.length**2 * len(bins.room) * _SMALL <= squares]
    for document in small:
        rows.put(document, _few(_units(document, multiple), rows.room))
    large = cut[: len(cut) - len(small)]
    ahead = _ahead(rows, sum(_units(document, multiple) ** 2 for document in large))
    for document in large:
        rows.put(document, _zigzag(_units(document, multiple), rows.room, ahead))
    return rows.held


class _Rows:
    """Fragments by rank, and what each rank has left and works, in units of `multiple` tokens."""

    def __init__(self, bins: _Bins, multiple: int) -> None:
        self.held = [list(held) for held in bins.held]
        self.room = [tokens // multiple for tokens in bins.room]
        self.squares = [squares // multiple**2 for squares in bins.squares]  # twice the area
        self.multiple = multiple

    def put(self, document: Fragment, pieces: list[tuple[int, int]]) -> None:
        """(rank, units), from the document's start on."""
        done = 0
        for rank, count in pieces:
            position = done * self.multiple
            length = min(count * self.multiple, document.length - position)
            if length > 0:
                index = document.index + position
                piece = replace(document, length=length, index=index, position=position)
                self.held[rank].append(piece)
            self.room[rank] -= count
            self.squares[rank] += _square(done, count)
            done += count


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


def _units(document: Fragment, multiple: int) -> int:
    return -(-document.length // multiple)


def _zigzag(units: int, room: list[int], ahead: list[float]) -> list[tuple[int, int]]:
    """(rank, units), from the document's start on: by its room, a rank takes a piece from either
    end of what others have left, the more from the early end the more its work is ahead.

    Takes from `ahead` what it evens.
    """
    front, back, first, last = [], [], 0, units
    shares = _shares(units, room)
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


def _shares(units: int, room: list[int]) -> list[int]:
    """In proportion to the room."""
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
