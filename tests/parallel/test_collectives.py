"""Messages of an axis: what arrives, what is counted, and that adjoints are adjoint."""

import torch

from parallel.collectives import Axis
from tests.parallel.ranks import on_ranks


def test_messages_arrive_and_are_counted():
    on_ranks(3, check_messages)


def check_messages(axis: Axis) -> None:
    words = {"op": "softmax", "direction": "forward"}
    me, ranks = axis.rank, axis.ranks
    sent = [me + to for to in range(ranks)]  # as many rows as both ranks' numbers
    x = torch.cat([torch.full((rows, 2), 10.0 * me + to) for to, rows in enumerate(sent)])
    got = axis.exchange(x, sent, sent, **words).wait()
    expected = [torch.full((rows, 2), 10.0 * source + me) for source, rows in enumerate(sent)]
    assert torch.equal(got, torch.cat(expected))
    assert axis.traffic.take() == {("all_to_all", "softmax", "forward"): 8 * (sum(sent) - sent[me])}

    before = (me - 1) % ranks
    got = axis.shift(torch.full((me, 3), float(me)), before, **words).wait()  # rank 0 sends nothing
    assert torch.equal(got, torch.full((before, 3), float(before)))
    assert axis.traffic.take() == {("shift", "softmax", "forward"): 12 * before}
    got = axis.shift(torch.full((1, 1), float(me)), 1, step=-1, **words).wait()
    assert got.item() == (me + 1) % ranks

    parts = torch.arange(2.0 * ranks).view(-1, 1) + me
    got = axis.gather(parts[:2], **words).wait()
    assert torch.equal(got, torch.cat([torch.arange(2.0).view(-1, 1) + r for r in range(ranks)]))
    got = axis.sum_scatter(parts, **words).wait()
    own = torch.arange(2.0 * me, 2.0 * me + 2).view(-1, 1)
    assert torch.equal(got, ranks * own + sum(range(ranks)))
