"""Who holds what and who sees what under context parallelism: integers on the host.

Everything here derives from `SequenceInfo.peers`, the fragments of every context rank, so that all
ranks plan the same messages without asking each other or a device.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from models.sequence import Fragment, Peers, SequenceInfo, SequenceOp, per_layout
from parallel.collectives import Axis

Row = tuple[Fragment, ...]


def own_rank(info: SequenceInfo) -> int:
    """This rank's place among `info.peers`.

    Raises ValueError unless the one row of `info` is among them.
    """
    if info.shape[0] != 1 or info.fragments[0] not in info.peers:
        raise ValueError(
            f"a context-parallel op got {info.shape[0]} rows and {len(info.peers)} peers; it takes "
            "one row and the fragments of every context rank, this one's included"
        )
    return info.peers.index(info.fragments[0])


def rank_on(axis: Axis, info: SequenceInfo) -> int:
    """`own_rank`; raises ValueError unless `info.peers` are the ranks of the axis, in its order."""
    rank = own_rank(info)
    if (rank, len(info.peers)) != (axis.rank, axis.ranks):
        raise ValueError(
            f"rank {axis.rank} of {axis.ranks} got the row of rank {rank} of {len(info.peers)}; "
            "both must be the same"
        )
    return rank


def refuse_keys(scheme: SequenceOp, info: SequenceInfo, key_info: SequenceInfo | None) -> None:
    """Raises ValueError for keys that do not sit with the queries, as in decoding."""
    if key_info is not None and key_info is not info:
        raise ValueError(
            f"{type(scheme).__name__} got key_info; under context parallelism keys sit with queries"
        )


@per_layout
def row_info(peers: Peers, row: Row, device: torch.device) -> SequenceInfo:
    """Of a row made of fragments of the peers; 17 bytes a token on the device, moved once."""
    return SequenceInfo.from_fragments([row], device)


def tokens(row: Iterable[Fragment]) -> int:
    return sum(fragment.length for fragment in row)


@per_layout
def cut_documents(peers: Peers) -> frozenset[int]:
    """Starts of the documents that lie on more than one rank; `Fragment.start` names a document."""
    holders = defaultdict(set)
    for rank, row in enumerate(peers):
        for fragment in row:
            if fragment.length and not fragment.padding:
                holders[fragment.start].add(rank)
    return frozenset(start for start, ranks in holders.items() if len(ranks) > 1)


@per_layout
def cut_part(peers: Peers, rank: int) -> Row:
    """The fragments of a rank's row that are of cut documents."""
    cut = cut_documents(peers)
    return tuple(f for f in peers[rank] if f.start in cut and not f.padding)


def seen(keys: Row, queries: Row, *, causal: bool) -> Row:
    """The fragments of another rank's row of which some query of this row sees a token.

    That is then every token of the fragment: no fragment holds tokens between its own. Unless
    causal, it is every fragment of the documents of the queries.
    """
    last: dict[int, int] = {}
    for query in queries:
        if query.length:
            last[query.start] = max(query.index, last.get(query.start, -1))
    found = (key for key in keys if key.length and key.start in last)
    return tuple(key for key in found if not causal or key.index < last[key.start])


def where(row: Row, chosen: Collection[Fragment]) -> tuple[slice, ...]:
    """The tokens of a row that are of the chosen fragments, as slices, neighbours joined."""
    found: list[slice] = []
    stop = 0
    for fragment in row:
        start, stop = stop, stop + fragment.length
        if fragment not in chosen:
            continue
        if found and found[-1].stop == start:
            found[-1] = slice(found[-1].start, stop)
        else:
            found.append(slice(start, stop))
    return tuple(found)


def take(x: Tensor, rows: tuple[slice, ...]) -> Tensor:
    """The rows of x in these slices; x itself if that is all of it, else a copy."""
    if rows == (slice(0, len(x)),):
        return x
    return torch.cat([x[:0], *(x[where] for where in rows)])


def add_(x: Tensor, rows: tuple[slice, ...], part: Tensor) -> None:
    """Adds to x in place what `take` took from a tensor of its shape."""
    for where, piece in _pieces(rows, part):
        x[where] += piece


def put_(x: Tensor, rows: tuple[slice, ...], part: Tensor) -> None:
    """Writes into x what `take` took."""
    for where, piece in _pieces(rows, part):
        x[where] = piece


def _pieces(rows: tuple[slice, ...], part: Tensor) -> Iterator[tuple[slice, Tensor]]:
    sizes = [where.stop - where.start for where in rows]
    return zip(rows, part.split(sizes) if sizes else (), strict=True)


def merged(rows: Iterable[Row]) -> Row:
    """One row of all the fragments, by their index in the packed global sequence."""
    return tuple(sorted((f for row in rows for f in row), key=lambda fragment: fragment.index))


@per_layout
def merged_info(peers: Peers, ranks: int, rank: int, device: torch.device) -> SequenceInfo:
    """Of the merged row of a rank's group of so many neighbours; its peers are those of all groups.

    It takes 17 bytes a token of the group on the device.
    """
    rows = [merged(peers[i : i + ranks]) for i in range(0, len(peers), ranks)]
    return SequenceInfo.from_fragments([rows[rank // ranks]], device, peers=rows)


@per_layout
def merge_order(peers: Peers, ranks: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token permutations between the rows of that group one behind the other and the merged row.

    concatenated[first] is merged, and merged[second] is concatenated; both int64.
    """
    start = rank // ranks * ranks
    index = [
        torch.arange(f.index, f.index + f.length)
        for row in peers[start : start + ranks]
        for f in row
    ]
    order = torch.cat(index).argsort()
    return order.to(device), order.argsort().to(device)
