"""Softmax attention to chunks of keys that differ by head: the pieces of the tiled form.

Everything is in rows, one for each batch row and key head, and chunks: queries [R, N, P, dim], with
P the queries of a chunk, C tokens times the query heads of a key head; keys [R, M, C, dim]; all in
fp32 or wider, queries scaled. The keys of a row come in any order and with gaps, whose index is
ABSENT; chunks that no query sees are neither copied nor multiplied. kv are keys and values, or one
tensor that is both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]

CPU_SCORES, CUDA_SCORES = 2**21, 2**26  # scores that exist at a time


class Sight(NamedTuple):
    """Query chunks see those key chunks of their row with first <= index < behind; [R, N] int64."""

    first: Tensor
    behind: Tensor


class Tile(NamedTuple):
    queries: slice  # chunks
    keys: slice  # places in a row's sorted keys


class Group(NamedTuple):
    """Rows of about equally many visible keys: they are padded to the longest."""

    rows: Tensor | None  # None: all
    keys: int  # of the longest
    tiles: tuple[Tile, ...]

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def put(self, x: Tensor, part: Tensor) -> None:
        x[slice(None) if self.rows is None else self.rows] = part


@dataclass(frozen=True, eq=False)
class Plan:
    """Who sees what, by place: the keys of a row sorted by index."""

    order: Tensor  # [R, M]
    first: Tensor  # [R, N], first place seen and first behind those seen
    behind: Tensor
    groups: tuple[Group, ...]
    pairs: int  # of a query chunk and a key chunk that it sees

    @classmethod
    def make(cls, index: Tensor, sight: Sight, tokens: int, queries: int) -> "Plan":
        """index: [R, M]; tokens and queries of a chunk. Waits for the device, once."""
        ordered, order = index.sort(dim=1)
        ordered = ordered.contiguous()
        first_seen, behind_seen = (torch.searchsorted(ordered, x.contiguous()) for x in sight)
        first, behind = torch.stack((first_seen, behind_seen)).cpu()
        pairs = int((behind - first).clamp(min=0).sum())
        reach = behind.masked_fill(behind <= first, 0).amax(1)
        scores = CUDA_SCORES if index.is_cuda else CPU_SCORES
        groups = []
        for rows in _alike(reach):
            keys = int(reach[rows].max())
            size = max(1, scores // (len(rows) * queries * keys * tokens))
            tiles = tuple(_tiles(first[rows], behind[rows], size))
            chosen = None if len(rows) == len(reach) else torch.tensor(rows).to(index.device)
            groups.append(Group(chosen, keys, tiles))
        return cls(order, first_seen, behind_seen, tuple(groups), pairs)

    def places(self, group: Group) -> tuple[Tensor, Tensor]:
        """Row and chunk of the sorted keys of a group, [rows, 1] and [rows, keys]."""
        rows = group.rows
        if rows is None:
            rows = torch.arange(len(self.order), device=self.order.device)
        return rows.unsqueeze(1), self.order[rows, : group.keys]

    def seen(self, group: Group, tile: Tile) -> Tensor:
        """[rows, query chunks, 1, key chunks, 1] bool."""
        place = torch.arange(tile.keys.start, tile.keys.stop, device=self.order.device)
        first = group.take(self.first)[:, tile.queries, None]
        behind = group.take(self.behind)[:, tile.queries, None]
        return ((first <= place) & (place < behind))[:, :, None, :, None]


def _alike(reach: Tensor) -> list[list[int]]:
    """Rows that see any keys, in groups within a factor of two."""
    groups: dict[int, list[int]] = {}
    for row, keys in enumerate(reach.tolist()):
        if keys:
            groups.setdefault((keys - 1).bit_length(), []).append(row)
    return [groups[size] for size in sorted(groups)]


def _tiles(first: Tensor, behind: Tensor, size: int) -> Iterator[Tile]:
    """Of `size` query chunks, with the keys that some row sees; first, behind: on the host."""
    none = behind <= first
    starts = first.masked_fill(none, torch.iinfo(first.dtype).max).amin(0)
    stops = behind.masked_fill(none, 0).amax(0)
    for chunk in range(0, first.shape[1], size):
        queries = slice(chunk, min(chunk + size, first.shape[1]))
        start, stop = int(starts[queries].min()), int(stops[queries].max())
        if start < stop:
            yield Tile(queries, slice(start, stop))


def attend(q: Tensor, kv: Rows, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Output [R, N, P, v_dim] and lse [R, N, P]; 0 and -inf where a query sees no key.

    seen: broadcasts over [R, N, P, M, C].
    """
    scores = _scores(q, kv[0], seen)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_()
    output = weights @ kv[-1].flatten(1, 2)
    return output.view(*q.shape[:3], -1), lse.view(q.shape[:3])


class Grads(NamedTuple):
    q: Tensor
    kv: Rows
    gate: Tensor  # [R, M], of what multiplies exp(score) for a chunk of keys

    @classmethod
    def zeros(cls, q: Tensor, kv: Rows) -> "Grads":
        grad_q, *grad_kv = (x.new_zeros(x.shape) for x in (q, *kv))
        return cls(grad_q, tuple(grad_kv), q.new_zeros(kv[0].shape[:2]))

    @property
    def of_chunks(self) -> Rows:
        """Those of the chunks of keys."""
        return *self.kv, self.gate

    def like(self, q: Tensor, gate: Tensor, *kv: Tensor) -> Rows:
        """In this order, and in the dtypes of what they are of."""
        pairs = zip((self.q, self.gate, *self.kv), (q, gate, *kv), strict=True)
        return tuple(grad.to(x.dtype) for grad, x in pairs)


def attend_backward(
    grad: Tensor, q: Tensor, kv: Rows, lse: Tensor, delta: Tensor, seen: Tensor
) -> Grads:
    """lse: over all keys; delta: sum of output times its gradient; both [R, N, P]."""
    flat, k, v = grad.flatten(1, 2), kv[0], kv[-1]
    weights = _scores(q, k, seen).sub_(lse.flatten(1).unsqueeze(-1)).exp_()
    grad_v = (weights.mT @ flat).view_as(v)
    grad_scores = (flat @ v.flatten(1, 2).mT).sub_(delta.flatten(1).unsqueeze(-1)).mul_(weights)
    grad_q = (grad_scores @ k.flatten(1, 2)).view_as(q)
    grad_k = (grad_scores.mT @ q.flatten(1, 2)).view_as(k)
    gate = grad_scores.sum(1).view(*k.shape[:3]).sum(-1)
    return Grads(grad_q, (grad_k, grad_v) if len(kv) == 2 else (grad_k.add_(grad_v),), gate)


def _scores(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """[R, N x P, M x C]."""
    scores = q.flatten(1, 2) @ k.flatten(1, 2).mT
    scores.view(*q.shape[:3], *k.shape[1:3]).masked_fill_(~seen, -torch.inf)
    return scores


def block(q: Tensor, kv: Rows, plan: Plan) -> tuple[Tensor, Tensor]:
    """Output [R, N, P, v_dim] and lse [R, N, P] over the keys that the plan shows."""
    output = q.new_zeros(*q.shape[:3], kv[-1].shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf)
    for group in plan.groups:
        at = plan.places(group)
        queries, seen = group.take(q), [x[at] for x in kv]
        outputs, sums = group.take(output), group.take(lse)
        for tile in group.tiles:
            part = tuple(x[:, tile.keys] for x in seen)
            results = attend(queries[:, tile.queries], part, plan.seen(group, tile))
            outputs[:, tile.queries], sums[:, tile.queries] = results
        group.put(output, outputs)
        group.put(lse, sums)
    return output, lse


def block_backward(
    grad: Tensor, q: Tensor, kv: Rows, lse: Tensor, delta: Tensor, plan: Plan
) -> Grads:
    """Gradients due to the keys that the plan shows, given what `attend_backward` is."""
    total = Grads.zeros(q, kv)
    for group in plan.groups:
        at = plan.places(group)
        queries, seen = group.take(q), tuple(x[at] for x in kv)
        outer, sums, deltas = (group.take(x) for x in (grad, lse, delta))
        grads = Grads.zeros(queries, seen)
        for tile in group.tiles:
            part = attend_backward(
                outer[:, tile.queries],
                queries[:, tile.queries],
                tuple(x[:, tile.keys] for x in seen),
                sums[:, tile.queries],
                deltas[:, tile.queries],
                plan.seen(group, tile),
            )
            grads.q[:, tile.queries] = part.q
            for so_far, more in zip(grads.of_chunks, part.of_chunks, strict=True):
                so_far[:, tile.keys] += more
        group.put(total.q, grads.q)
        for of_all, of_group in zip(total.of_chunks, grads.of_chunks, strict=True):
            of_all[at] = of_group
    return total


def own_tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Parts of [chunks of all rows, ...] whose scores may exist at a time."""
    limit = CUDA_SCORES if q.is_cuda else CPU_SCORES
    size = max(1, limit // (q.shape[-2] * k.shape[-2]))
    return (slice(i, i + size) for i in range(0, q.shape[0] * q.shape[1], size))


def causal(q: Tensor, k: Tensor) -> Tensor:
    """What the queries of a chunk see of its own keys, [P, 1, C]; C x query heads are P."""
    tokens = k.shape[-2]
    query = torch.arange(q.shape[-2], device=q.device) // (q.shape[-2] // tokens)
    return (query.unsqueeze(1) >= torch.arange(tokens, device=q.device)).unsqueeze(1)


def own_chunks(q: Tensor, kv: Rows) -> tuple[Tensor, Tensor]:
    """Output and lse of queries over the keys of their own chunk up to themselves."""
    output = q.new_empty(*q.shape[:3], kv[-1].shape[-1])
    lse = q.new_empty(q.shape[:3])
    q_rows, *kv_rows = (_as_rows(x) for x in (q, *kv))
    outputs, sums = output.flatten(0, 1), lse.flatten(0, 1)
    seen = causal(q, kv[0])
    for part in own_tiles(q, kv[0]):
        results = attend(q_rows[part], tuple(x[part] for x in kv_rows), seen)
        outputs[part], sums[part] = (x.squeeze(1) for x in results)
    return output, lse


def _as_rows(x: Tensor) -> Tensor:
    """Every chunk a row of its own."""
    return x.flatten(0, 1).unsqueeze(1)


def own_backward(grad: Tensor, q: Tensor, kv: Rows, lse: Tensor, delta: Tensor) -> Grads:
    """Due to the own chunk, which has no gate."""
    by_query = [_as_rows(x) for x in (grad, q, lse, delta)]
    kv_rows = [_as_rows(x) for x in kv]
    grad_q, *grad_kv = (x.new_empty(x.shape) for x in (q, *kv))
    seen = causal(q, kv[0])
    for part in own_tiles(q, kv[0]):
        outer, queries, sums, deltas = (x[part] for x in by_query)
        keys = tuple(x[part] for x in kv_rows)
        piece = attend_backward(outer, queries, keys, sums, deltas, seen)
        for total, more in zip((grad_q, *grad_kv), (piece.q, *piece.kv), strict=True):
            total.flatten(0, 1)[part] = more.squeeze(1)
    return Grads(grad_q, tuple(grad_kv), q.new_zeros(kv[0].shape[:2]))
