"""What the softmax schemes send: bytes against an own count of tokens, and when they are sent."""

from collections import Counter
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import parallel.gather
import parallel.ring
from models.ops.softmax import AtenSoftmax
from models.sequence import SequenceInfo, SoftmaxAttention
from parallel.collectives import Axis, Pending, Traffic
from tests.parallel.layouts import Row, cases, contiguous, local, place, rank_info, zigzag
from tests.parallel.ranks import on_ranks
from tests.parallel.softmax_schemes import DIM, SCHEMES, V_DIM, attend, errors, inputs


def test_bytes_equal_the_prediction():
    on_ranks(4, check_bytes)


def check_bytes(axis: Axis) -> None:
    for causal in (True, False):
        op = AtenSoftmax(causal=causal)
        for case, peers in cases(axis.ranks):
            if not case.endswith(("one", "many")):
                check_tokens(axis, op, peers)
        check_formulas(axis, op)
        check_silence(axis, op)


def check_tokens(axis: Axis, op: SoftmaxAttention, peers: tuple[Row, ...]) -> None:
    heads, token = (8, 4), 4 * (DIM + V_DIM)  # values of K and V per token
    run_bf16(SCHEMES["ring"](op, axis), peers, heads, axis.rank)
    forward, keys, gradients = ring_tokens(peers, axis.rank, op.causal)
    assert axis.traffic.take() == predicted(
        "shift", 2 * token * forward, 2 * token * keys + 4 * token * gradients
    ), (op.causal, peers)
    run_bf16(SCHEMES["gather"](op, axis), peers, heads, axis.rank)
    read, lent = gather_tokens(peers, axis.rank, op.causal)
    assert axis.traffic.take() == predicted(
        "all_to_all", 2 * token * read, 2 * token * read + 4 * token * lent
    ), (op.causal, peers)


def predicted(kind: str, forward: int, backward: int) -> Counter[tuple[str, str, str]]:
    return Counter({(kind, "softmax", "forward"): forward, (kind, "softmax", "backward"): backward})


def run_bf16(op: SoftmaxAttention, peers, heads: tuple[int, int], rank: int) -> list[Tensor]:
    info = rank_info(peers, rank)
    tensors = inputs(peers, heads, dtype=torch.bfloat16)
    return attend(op, [local(x, info) for x in tensors], info)


def readers(peers: tuple[Row, ...], causal: bool) -> dict[tuple[int, int], set[int]]:
    """For each (owner, token) the other ranks with a token, if causal a later one, of its
    document."""
    held = {
        (rank, fragment.index + i): None if fragment.padding else fragment.start
        for rank, row in enumerate(peers)
        for fragment in row
        for i in range(fragment.length)
    }
    return {
        (owner, index): {
            rank
            for (rank, other), name in held.items()
            if rank != owner and name is not None and name == document
            if other > index or not causal
        }
        for (owner, index), document in held.items()
    }


def ring_tokens(peers: tuple[Row, ...], rank: int, causal: bool) -> tuple[int, int, int]:
    """Tokens that a rank receives: keys forward, keys backward, gradients."""
    forward = keys = gradients = 0
    for (owner, _), ranks in readers(peers, causal).items():
        reach = max(((reader - owner) % len(peers) for reader in ranks), default=0)
        hops = (rank - owner) % len(peers)
        forward += 0 < hops <= reach
        keys += 0 < hops < reach
        gradients += hops < reach
    return forward, keys, gradients


def gather_tokens(peers: tuple[Row, ...], rank: int, causal: bool) -> tuple[int, int]:
    """Tokens that a rank reads, and how often its own are read."""
    every = readers(peers, causal).items()
    read = sum(rank in ranks for _, ranks in every)
    return read, sum(len(ranks) for (owner, _), ranks in every if owner == rank)


def check_formulas(axis: Axis, op: SoftmaxAttention) -> None:
    """One document that fills the row under zigzag; the busiest rank."""
    ranks, n, heads, dim = axis.ranks, 6, (8, 4), DIM + V_DIM
    peers = place([ranks * n], zigzag(ranks, n))
    formulas = {
        "ring": (ranks - 1) * n * heads[1] * dim,
        "gather": (ranks - 1) * n * heads[1] * dim,
        "ulysses": n * sum(heads) * dim * (ranks - 1) // ranks,
    }
    for name, elements in formulas.items():
        run_bf16(SCHEMES[name](op, axis), peers, heads, axis.rank)
        counted = axis.traffic.take().items()
        forward = torch.tensor(sum(x for (_, _, way), x in counted if way == "forward"))
        dist.all_reduce(forward, dist.ReduceOp.MAX)
        assert forward == 2 * elements, name


def check_silence(axis: Axis, op: SoftmaxAttention) -> None:
    """No document on several ranks: no message."""
    axis.traffic.trace = []
    peers = place([7, 3, 4, 1, 6], contiguous(axis.ranks, 7))
    for name, build in SCHEMES.items():
        found = errors([build(op, axis)], peers, (4, 2), axis.rank, causal=op.causal)
        assert found[0] < 1e-10, name
    assert not axis.traffic.take()
    assert axis.traffic.trace == []
    axis.traffic.trace = None


class Noting(AtenSoftmax):
    """Writes its blocks into the trace, and counts what is alive while they are computed."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic, self.most = traffic, 0
        self.moved: list[StorageWeakRef] = []

    def block(self, q, k, v, info, key_info, **kwargs):
        self.note(info, key_info)
        return super().block(q, k, v, info, key_info, **kwargs)

    def block_backward(self, grad, q, k, v, output, lse, info, key_info, **kwargs):
        self.note(info, key_info)
        return super().block_backward(grad, q, k, v, output, lse, info, key_info, **kwargs)

    def note(self, info: SequenceInfo, key_info: SequenceInfo) -> None:
        self.traffic.note("own block" if info is key_info else "block", "")
        self.most = max(self.most, len({x.cdata for x in self.moved if not x.expired()}))

    def watch(self, axis: Axis, x: Tensor, *args, original=Axis.shift, **kwargs) -> Pending:
        """In the place of `Axis.shift`: remembers the buffers of keys and values."""
        pending = original(axis, x, *args, **kwargs)
        for buffer in (x, pending._tensor):
            if buffer.dtype == torch.bfloat16 and buffer.numel():  # gradients are fp32
                self.moved.append(StorageWeakRef(buffer.untyped_storage()))
        return pending


RING = (
    "post, own block, wait, post, block, wait, post, block, wait, block",
    "post, block, post, wait, post, block, wait, post, wait, block, wait, post, own block, wait",
)
GATHER = (
    "post, post, own block, wait, block, own block, wait, block",
    "post, post, wait, block, post, own block, wait, block, wait, post, own block, wait",
)


def test_messages_overlap_blocks():
    on_ranks(4, check_overlap)


def check_overlap(axis: Axis) -> None:
    assert trace("ring", axis)[:2] == RING
    assert trace("gather", axis)[:2] == GATHER
    with patch("parallel.ring._shift", partial(Late, parallel.ring._shift)):
        assert all(
            got != expected for got, expected in zip(trace("ring", axis), RING, strict=False)
        )
    with patch("parallel.gather._exchange", partial(Late, parallel.gather._exchange)):
        pairs = zip(trace("gather", axis), GATHER, strict=False)
        assert all(got != expected for got, expected in pairs)

    assert trace("ring", axis)[2] == 2
    hoard = []

    def hoarding(*args, original=parallel.ring._shift):
        hoard.append(original(*args))
        return hoard[-1]

    with patch("parallel.ring._shift", hoarding):
        assert trace("ring", axis)[2] > 2


class Late:
    """A message that is posted only when it is awaited."""

    def __init__(self, *call) -> None:
        self.call = call

    def wait(self) -> Tensor:
        start, *args = self.call
        return start(*args).wait()


def trace(name: str, axis: Axis) -> tuple[str, str, int]:
    """Events of the forward and of the backward, and most buffers of keys alive in the forward."""
    peers = place([axis.ranks * 6], zigzag(axis.ranks, 6))
    info, op = rank_info(peers, axis.rank), Noting(axis.traffic)
    *qkv, weight = (local(x, info) for x in inputs(peers, (4, 2), dtype=torch.bfloat16))
    forward: list[tuple[str, str]] = []
    backward: list[tuple[str, str]] = []
    axis.traffic.trace = forward
    with patch.object(Axis, "shift", lambda *args, **kwargs: op.watch(*args, **kwargs)):
        output = SCHEMES[name](op, axis)(*qkv, info)
        most = op.most
        axis.traffic.trace = backward
        (output * weight).sum().backward()
    axis.traffic.trace = None
    return ", ".join(e for e, _ in forward), ", ".join(e for e, _ in backward), most
