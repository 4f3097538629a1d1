"""Recurrences with gated writes over several ranks against one rank: a gate travels with tokens."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.ops.routed import RoutedRecurrence
from models.ops.routed_delta import ChunkedRoutedDelta, TokenLoopRoutedDelta
from models.ops.routed_grid import chunk_grid
from models.sequence import SequenceInfo
from parallel.collectives import Axis
from parallel.state_passing import StatePassing, UlyssesRecurrence
from tests.parallel.layouts import Row, local, random_heads, rank_info, whole
from tests.parallel.ranks import on_ranks
from tests.parallel.routed_schemes import CHUNK, cases, left_out, planned, routing
from tests.parallel.softmax_schemes import worst
from tests.parallel.test_softmax_schemes import two_axes
from tests.parallel.test_state_passing import SCHEMES

HEADS, KEY, VALUE = 4, 4, 3


def inputs(peers: tuple[Row, ...], channels: int) -> list[Tensor]:
    """q, k, v, log_decay, beta, write and a weight of the output."""
    sizes: list[tuple[int, ...]] = [(KEY,), (KEY,), (VALUE,), (channels,), (), (VALUE,)]
    q, k, v, gate, beta, weight = random_heads(peers, [(HEADS, *size) for size in sizes])
    write = routing(whole(peers), HEADS)
    tensors = q, F.normalize(k, dim=-1), v, -gate.sigmoid(), beta.sigmoid(), write, weight
    return [x.detach().requires_grad_() for x in tensors]


def run(op, tensors: list[Tensor], info: SequenceInfo) -> list[Tensor]:
    """Output and gradients, of the gate the sum over a chunk."""
    *tokens, write, weight = tensors
    output, grid = op(*tokens, info, write=write).output, chunk_grid(info, CHUNK)
    *grads, gate = torch.autograd.grad((output * weight).sum(), [*tokens, write])
    return [output.detach(), *grads, grid.spread(grid.cut(gate).sum(2))]


def error(build, peers: tuple[Row, ...], axis: Axis, channels: int, **keywords: bool) -> float:
    tensors, info = inputs(peers, channels), rank_info(peers, axis.rank)
    expected = run(TokenLoopRoutedDelta(chunk=CHUNK, **keywords), tensors, whole(peers))
    scheme = build(ChunkedRoutedDelta(chunk=CHUNK, **keywords), axis)
    return worst(run(scheme, [local(x, info) for x in tensors], info), expected, info)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_schemes_equal_one_rank(ranks):
    on_ranks(ranks, check_schemes)


def check_schemes(axis: Axis) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for i, (case, peers) in enumerate(cases(axis.ranks)):
        if left_out(i, axis.ranks):
            continue
        scheme, channels = list(SCHEMES)[i % 3], [1, KEY][i % 2]
        found = error(SCHEMES[scheme], peers, axis, channels, decays=i % 5 > 0)
        assert found < 1e-10, (case, scheme, found)


def test_two_levels_equal_one_rank():
    on_ranks(4, check_two_levels)


def check_two_levels(axis: Axis) -> None:
    ulysses, ring = two_axes(axis, 2)

    def build(op: RoutedRecurrence, _: Axis) -> UlyssesRecurrence:
        return UlyssesRecurrence(StatePassing(op, axis=ring), axis=ulysses)

    for case, peers in list(cases(4))[1::3]:
        assert error(build, peers, axis, KEY) < 1e-10, case


def test_a_lost_gate_is_noticed():
    on_ranks(2, check_lost_gate)


def check_lost_gate(axis: Axis) -> None:
    peers = planned([30, 5], 2, "zigzag")
    for build in SCHEMES.values():

        def ungated(op: RoutedRecurrence, axis: Axis, build=build):
            scheme = build(op, axis)
            return lambda *tokens, write: scheme(*tokens, write=0 * write + 1)

        found = torch.tensor(error(ungated, peers, axis, KEY))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        assert found > 1e-4
