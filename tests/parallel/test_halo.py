"""Convolutions over several ranks against one rank: gradients, bytes, order of messages."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.ops.conv import FragmentConv, ShiftedConv
from models.sequence import CausalConv, SequenceInfo
from parallel import halo
from parallel.collectives import Axis, Pending, Traffic
from parallel.halo import HaloExchange
from tests.models.ops.synthetic import ViewConv
from tests.parallel.layouts import (
    Row,
    cases,
    contiguous,
    local,
    place,
    random_heads,
    rank_info,
    scattered,
    whole,
    zigzag,
)
from tests.parallel.ranks import on_ranks

CHANNELS = 5


def inputs(
    peers: tuple[Row, ...], width: int = 4, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, the weight of the convolution, and one of the output."""
    x, weight, taps = random_heads(peers, [(CHANNELS,), (CHANNELS,), (CHANNELS, width)])
    return [t.detach().to(dtype).requires_grad_() for t in (x, taps[0, 0], weight)]


def summed(grad: Tensor) -> Tensor:
    """Over the ranks, as the gradient of a parameter is."""
    dist.all_reduce(grad)
    return grad


def error(op: CausalConv, peers: tuple[Row, ...], axis: Axis, width: int = 4) -> float:
    """Largest relative difference of the output and both gradients."""
    x, taps, weight = inputs(peers, width)
    output = ShiftedConv()(x, taps, whole(peers))
    expected = [output, *torch.autograd.grad((output * weight).sum(), (x, taps))]
    info = rank_info(peers, axis.rank)
    own = [local(x, info), taps.detach().clone().requires_grad_()]
    output = HaloExchange(op, axis=axis)(*own, info)
    got = [output, *torch.autograd.grad((output * local(weight, info)).sum(), own)]
    got[2] = summed(got[2])
    pairs = [(got[2], expected[2]), *((got[i], expected[i][:, info.index[0]]) for i in (0, 1))]
    assert all(a.isfinite().all() for a, _ in pairs)
    scale = max(y.abs().amax() for y in expected)
    return max((a - b).abs().amax() / scale for a, b in pairs).item()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_halo_equals_one_rank(ranks):
    on_ranks(ranks, check_cases)


def check_cases(axis: Axis) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for i, (case, peers) in enumerate(cases(axis.ranks)):
        for width in (1, 4, 9):  # none, the usual, and more than most fragments hold
            op = [FragmentConv(), ShiftedConv(), ViewConv()][i % 3]
            assert error(op, peers, axis, width) < 1e-10, (case, width)


def needed(peers: tuple[Row, ...], rank: int, reach: int) -> list[tuple[int, int]]:
    """(token, its rank) for each token that a rank lacks, once for every run that it precedes."""
    holder = {
        index: r
        for r, row in enumerate(peers)
        for f in row
        for index in range(f.index, f.index + f.length)
    }
    found, before = [], None
    for f in peers[rank]:
        if f.index != before:
            found += [
                (f.index - lag, holder[f.index - lag])
                for lag in range(1, min(reach, f.position) + 1)
            ]
        before = f.index + f.length
    return found


def test_bytes_are_the_rows_that_lie_elsewhere():
    on_ranks(4, check_bytes)


def check_bytes(axis: Axis) -> None:
    for peers in (
        place([5, 50, 3], zigzag(4, 16)),
        place([1, 40, 3, 8], scattered(4, 16)),
        place([64], [[(i, i + 1) for i in range(r, 64, 4)] for r in range(4)]),  # token by token
    ):
        for dtype, size in ((torch.float64, 8), (torch.bfloat16, 2)):
            rows = {r: needed(peers, r, 3) for r in range(4)}
            forward = sum(source != axis.rank for _, source in rows[axis.rank])
            backward = sum(
                source == axis.rank for r in rows if r != axis.rank for _, source in rows[r]
            )
            assert traffic(axis, peers, dtype) == {
                ("all_to_all", "conv", "forward"): forward * CHANNELS * size,
                ("all_to_all", "conv", "backward"): backward * CHANNELS * size,
            }
    assert not traffic(axis, place([8, 3, 5, 8, 1, 1, 6], contiguous(4, 8)), torch.float32)


def traffic(axis: Axis, peers: tuple[Row, ...], dtype: torch.dtype) -> dict:
    x, taps, _ = inputs(peers, dtype=dtype)
    info = rank_info(peers, axis.rank)
    HaloExchange(FragmentConv(), axis=axis)(local(x, info), taps, info).sum().backward()
    return dict(axis.traffic.take())


class Noted(FragmentConv):
    """Writes into the trace how many tokens it runs on, forward and backward."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def forward(self, x, weight, info, *, history=None):
        tokens = str(info.index.numel())
        self.traffic.note("run", tokens)
        output = super().forward(x, weight, info, history=history)
        output.register_hook(lambda _: self.traffic.note("run back", tokens))
        return output


def trace(axis: Axis) -> list[tuple[str, str]]:
    peers = place([24], zigzag(2, 12))
    x, taps, _ = inputs(peers)
    info = rank_info(peers, axis.rank)
    axis.traffic.trace = found = []
    HaloExchange(Noted(axis.traffic), axis=axis)(local(x, info), taps, info).sum().backward()
    return [(event, subject.removeprefix("conv all_to_all ")) for event, subject in found]


def test_local_work_runs_while_the_halo_travels():
    on_ranks(2, check_trace)


def check_trace(axis: Axis) -> None:
    heads = "3"  # one run goes on: the last on rank 0, the middle on rank 1
    expected = [
        *[("post", "forward"), ("run", "12"), ("wait", "forward"), ("run", heads)],
        *[("run back", heads), ("post", "backward"), ("run back", "12"), ("wait", "backward")],
    ]
    assert trace(axis) == expected
    exchange = Axis.exchange

    def at_once(*args, **kwargs) -> Pending:
        return Pending(exchange(*args, **kwargs).wait(), [], axis.traffic, "late")

    with patch.object(Axis, "exchange", at_once):
        assert trace(axis) != expected


def test_checkpointing_runs_it_again():
    on_ranks(3, check_checkpoint)


def check_checkpoint(axis: Axis) -> None:
    peers = place([5, 21, 3, 7], zigzag(3, 12))
    x, taps, _ = inputs(peers)
    info, scheme = rank_info(peers, axis.rank), HaloExchange(FragmentConv(), axis=axis)
    found = []
    for again in (False, True):
        own = local(x, info)

        def run(own: Tensor) -> Tensor:
            return scheme(own, taps, info).tanh()

        output = checkpoint(run, own, use_reentrant=False) if again else run(own)
        found.append([output, *torch.autograd.grad(output.square().sum(), (own, taps))])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def no_gradient(ctx, grad: Tensor):
    ctx.exchange.wait()
    return None, grad


def double_gradient(ctx, grad: Tensor):
    at = (torch.zeros_like(ctx.exchange.sends), ctx.exchange.sends)
    return None, grad.index_put(at, 2 * ctx.exchange.wait(), accumulate=True)


MUTATIONS = {
    "missing halo": (halo._Exchange, "wait", lambda self: torch.zeros_like(self._wait())),
    "no gradient": (halo._Depart, "backward", staticmethod(no_gradient)),
    "double gradient": (halo._Depart, "backward", staticmethod(double_gradient)),
}


def test_mutations_are_found():
    on_ranks(2, check_mutations)


def check_mutations(axis: Axis) -> None:
    for mutation, change in MUTATIONS.items():
        with patch.object(*change):
            found = torch.tensor(error(FragmentConv(), place([24], zigzag(2, 12)), axis))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        assert found > 1e-3, mutation


def test_bad_input():
    peers = place([12], zigzag(2, 6))
    x, taps, _ = inputs(peers)
    info, axis = rank_info(peers, 0), Axis(None, 0, 2, Traffic())  # type: ignore[arg-type]
    scheme = HaloExchange(FragmentConv(), axis=axis)
    with pytest.raises(ValueError, match="history"):
        scheme(local(x, info), taps, info, history=x[:, :3])
    with pytest.raises(ValueError, match="peers"):
        scheme(local(x, info), taps, SequenceInfo.from_fragments([peers[0]]))
    gap = (peers[0], tuple(replace(f, length=f.length - 1) for f in peers[1]))
    with pytest.raises(ValueError, match="goes on at position"):
        scheme(local(x, info), taps, rank_info(gap, 0))
