"""What a row of queries sees of a row of keys, cut into rectangles and causal squares: what kernels
that know no other mask are called for. Integers on the host."""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from models.ops.runs import Run, runs, unordered_runs
from models.sequence import Fragment


class Tile(NamedTuple):
    """Queries q_start..q_stop see keys k_start..k_stop of the same row: all of them or, in a
    square, each those up to itself; with `reverse`, those from itself on, which is the same with
    both in reverse order."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool = False
    reverse: bool = False


@lru_cache(maxsize=1024)
def tiles(
    row: tuple[Fragment, ...],
    key_row: tuple[Fragment, ...],
    *,
    causal: bool,
    window: int | None = None,
) -> tuple[Tile, ...]:
    """All that the queries of a row see of its keys, ordered by queries. Raises ValueError for a
    window where keys behind the query are seen too."""
    if window is not None and not causal:
        raise ValueError("a window of attention in both directions: ops.softmax=reference has it")
    stretches = runs if causal else unordered_runs
    keys = defaultdict(list)
    for run in stretches(key_row):
        keys[run.document].append(run)
    pairs = [(run, key_run) for run in stretches(row) for key_run in keys[run.document]]
    if not causal:
        return tuple(sorted(Tile(q.start, q.stop, k.start, k.stop) for q, k in pairs))
    if window is None:
        return tuple(sorted(tile for pair in pairs for tile in _causal_tiles(*pair)))
    return tuple(sorted(tile for pair in pairs for tile in _window_tiles(*pair, window)))


def _causal_tiles(q: Run, k: Run) -> list[Tile]:
    """At most three: keys before the diagonal, the square on it, queries behind all the keys."""
    to_q, to_k = q.start - q.index, k.start - k.index  # from global index to row
    q_end, k_end = q.stop - to_q, k.stop - to_k
    first, last = max(q.index, k.index), min(q_end, k_end)  # the diagonal, in global indices
    found = []
    if first + 1 == last:  # one query on the diagonal, as in decoding: no square
        found.append(Tile(first + to_q, last + to_q, k.start, last + to_k))
    elif first < last:
        square = (first + to_q, last + to_q, first + to_k, last + to_k)
        found.append(Tile(*square, causal=True))
        if k.index < first:
            found.append(Tile(first + to_q, last + to_q, k.start, first + to_k))
    behind = max(q.index, k_end)
    if behind < q_end:
        found.append(Tile(behind + to_q, q.stop, k.start, k.stop))
    return found


def _window_tiles(q: Run, k: Run, window: int) -> Iterator[Tile]:
    """In blocks of `window` tokens, on one grid of global indices: a query sees its own block up to
    itself, and of the block before it what is less than a window away, from itself on."""
    q_end = q.index + q.stop - q.start
    for start in range(q.index // window * window, q_end, window):
        queries = _clip(q, start, start + window)
        own, before = _clip(k, start, start + window), _clip(k, start - window, start)
        if own.start < own.stop:
            yield from _causal_tiles(queries, own)
        if before.start < before.stop:
            mirrored = _causal_tiles(_mirror(queries, 0), _mirror(before, window - 1))
            for q_start, q_stop, k_start, k_stop, square, _ in mirrored:
                yield Tile(-q_stop, -q_start, -k_stop, -k_start, square, reverse=square)


def _clip(run: Run, start: int, stop: int) -> Run:
    """Its tokens with indices start..stop, maybe none."""
    first = max(run.index, start)
    last = max(first, min(run.index + run.stop - run.start, stop))
    at = run.start + first - run.index
    return Run(at, at + last - first, first, run.position + first - run.index)


def _mirror(run: Run, shift: int) -> Run:
    """In reverse order: row and indices count down, the latter from `shift` further on."""
    last = run.index + run.stop - run.start - 1
    return Run(-run.stop, -run.start, -(last + shift), run.position)
