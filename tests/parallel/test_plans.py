"""Plans of a layout: made once per batch, however many rows and layers it has, and gone with it."""

import gc
import pickle
from collections.abc import Iterator
from unittest.mock import Mock, patch
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.ops.conv import ShiftedConv
from models.ops.delta_rule import TokenLoopDeltaRule
from models.ops.routed_grid import chunk_grid
from models.ops.softmax import AtenSoftmax
from models.sequence import Peers, SequenceInfo
from parallel.chains import chains
from parallel.collectives import Axis, Pending, Traffic
from parallel.gather import GatherAttention
from parallel.halo import HaloExchange
from parallel.plans import cut_part, row_info
from parallel.ring import RingAttention
from parallel.state_passing import StatePassing, UlyssesRecurrence
from parallel.ulysses import UlyssesAttention
from tests.parallel.layouts import contiguous, place, rank_info

CPU = torch.device("cpu")
RANKS = 70


class Unanswered(Axis):
    """The others send zeros: enough for the plans of one of many ranks."""

    def exchange(self, x, sent, received, *, op, direction):
        return self.shift(x, sum(received), op=op, direction=direction)

    def shift(self, x, rows, *, op, direction, step=1):
        return Pending(x.new_zeros(rows, *x.shape[1:]), [], self.traffic, op)


def last_of(ranks: int) -> Axis:
    return Unanswered(None, ranks - 1, ranks, Traffic())  # type: ignore[arg-type]


def long_document() -> SequenceInfo:
    """Of the last rank, which sees the rows of all the others."""
    return rank_info(place([RANKS * 2], contiguous(RANKS, 2)), RANKS - 1)


def many_documents() -> SequenceInfo:
    """Each cut in two, so that the second rank has as many segments."""
    held = [[(i, i + 2) for i in range(2 * rank, 4 * RANKS, 4)] for rank in range(2)]
    return rank_info(place([4] * RANKS, held), 1)


def attention(scheme: nn.Module, x: Tensor, info: SequenceInfo) -> Tensor:
    return scheme(x, x, x, info)


def recurrence(scheme: nn.Module, x: Tensor, info: SequenceInfo) -> Tensor:
    return scheme(x, x, x, -x.square(), x[..., 0].sigmoid(), info).output


def convolution(scheme: nn.Module, x: Tensor, info: SequenceInfo) -> Tensor:
    return scheme(x.flatten(2), torch.ones(4, 3), info).view_as(x)


def two_level() -> UlyssesAttention:
    inner = RingAttention(AtenSoftmax(), axis=last_of(RANKS // 2))
    return UlyssesAttention(inner, axis=last_of(2))


CASES = {
    "ring": (long_document, attention, lambda: RingAttention(AtenSoftmax(), axis=last_of(RANKS))),
    "gather": (
        long_document,
        attention,
        lambda: GatherAttention(AtenSoftmax(), axis=last_of(RANKS)),
    ),
    "two levels": (long_document, attention, two_level),
    "ulysses": (
        many_documents,
        attention,
        lambda: UlyssesAttention(AtenSoftmax(), axis=last_of(2)),
    ),
    "state passing": (
        many_documents,
        recurrence,
        lambda: StatePassing(TokenLoopDeltaRule(), axis=last_of(2)),
    ),
    "ulysses recurrence": (
        many_documents,
        recurrence,
        lambda: UlyssesRecurrence(TokenLoopDeltaRule(), axis=last_of(2)),
    ),
    "halo": (many_documents, convolution, lambda: HaloExchange(ShiftedConv(), axis=last_of(2))),
}
MANY_ROWS = ("ring", "state passing")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is freed is freed with its last reference."""
    gc.disable()
    yield
    gc.enable()


def layer(name: str, info: SequenceInfo) -> None:
    """Forward, recomputation and backward."""
    _, call, build = CASES[name]
    x = torch.ones(*info.shape, 2, 2, requires_grad=True)
    checkpoint(call, build(), x, info, use_reentrant=False).sum().backward()


def tensors(held: object) -> Iterator[Tensor]:
    """All of them in a plan."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, SequenceInfo):
        yield from tensors((held.index, held.positions, held.valid, held.memo, held.peers.memo))
    elif isinstance(held, dict | tuple):
        for part in held.values() if isinstance(held, dict) else held:
            yield from tensors(part)


@pytest.mark.parametrize("name", CASES)
def test_plans_are_made_once_per_batch_and_gone_with_it(name, uncollected):
    info = CASES[name][0]()
    made = Mock(wraps=SequenceInfo.from_fragments)
    with patch.object(SequenceInfo, "from_fragments", made):
        layer(name, info)
        once, plans = made.call_count, dict(info.peers.memo)
        for _ in range(2):
            layer(name, info)
        assert made.call_count == once
    assert info.peers.memo.keys() == plans.keys()
    assert all(info.peers.memo[key] is plan for key, plan in plans.items())
    assert once >= RANKS or name not in MANY_ROWS
    kept = [ref(x) for x in tensors(plans)]
    assert kept
    del info, plans, made
    assert not any(x() is not None for x in kept)


def test_each_copy_of_a_batch_has_plans_of_its_own(uncollected):
    """A batch that waits on the host for its next use keeps nothing on a device."""
    host = long_document()
    info = host.to("cpu")
    part = cut_part(info.peers, RANKS - 1)
    plan = row_info(info.peers, part, CPU)
    assert row_info(info.peers, part, CPU) is plan
    assert info.peers == host.peers and not host.peers.memo
    index = ref(plan.index)
    del info, plan
    assert index() is None


def test_plans_are_neither_pickled_nor_compared():
    info = long_document()
    assert chains(info.peers)
    copy = pickle.loads(pickle.dumps(info))
    assert isinstance(copy.peers, Peers) and copy.peers == info.peers
    assert info.peers.memo and not copy.peers.memo
    assert chains(copy.peers) == chains(info.peers)


def test_the_grid_of_chunks_is_gone_with_its_batch(uncollected):
    info = SequenceInfo.from_lengths([[8, 6]])
    grid = chunk_grid(info, 4)
    assert chunk_grid(info, 4) is grid
    length = ref(grid.length)
    del info, grid
    assert length() is None
