"""Short convolution: the definition by hand, and the fast form against it."""

import pytest
import torch

from models.ops.conv import FragmentConv, ShiftedConv
from models.ops.fla import _conv_bounds
from models.sequence import SequenceInfo
from tests.helpers import INFOS, assert_equal, outputs_and_gradients, random_tensors

CHANNELS, WIDTH = 3, 4


def inputs(info: SequenceInfo, width: int = WIDTH, **kwargs):
    batch, seq = info.shape
    shapes = (batch, seq, CHANNELS), (CHANNELS, width), (batch, width - 1, CHANNELS)
    return random_tensors(*shapes, **kwargs)


def by_hand(x, weight, history, info):
    """A token reaches the one `lag` before it in the packed sequence, if it is in the same
    document and in the row or the history."""
    rows = []
    for b, fragments in enumerate(info.fragments):
        reach = weight.shape[1] - 1
        known = {fragments[0].index - reach + i: history[b, i] for i in range(reach)}
        known |= {int(index): x[b, t] for t, index in enumerate(info.index[b])}
        previous = [int(i) for i in torch.arange(-reach, 0) + info.index[b, 0]]
        order = previous + info.index[b].tolist()
        outputs = []
        for t, index in enumerate(info.index[b].tolist()):
            total = torch.zeros(CHANNELS, dtype=x.dtype)
            for lag in range(min(reach, int(info.positions[b, t])) + 1):
                if order[t + reach - lag] == index - lag:
                    total = total + known[index - lag] * weight[:, reach - lag]
            outputs.append(total)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("conv", [ShiftedConv(), FragmentConv()], ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("name", INFOS)
def test_by_hand(conv, name):
    info = INFOS[name]
    tensors = inputs(info)
    got = outputs_and_gradients(lambda x, w, h: conv(x, w, info, history=h), tensors)
    expected = outputs_and_gradients(lambda *x: by_hand(*x, info), tensors)
    assert_equal(got, expected, 1e-12)

    x, weight, history = tensors
    got = outputs_and_gradients(lambda x, w: conv(x, w, info), [x, weight])
    nothing = torch.zeros_like(history)
    expected = outputs_and_gradients(lambda x, w: by_hand(x, w, nothing, info), [x, weight])
    assert_equal(got, expected, 1e-12)


@pytest.mark.parametrize("conv", [ShiftedConv(), FragmentConv()], ids=lambda op: type(op).__name__)
def test_history_holds_as_many_tokens_as_the_position_allows(conv):
    x, weight, history = inputs(SequenceInfo.span(2, 2, 7))
    start = conv(x, weight, SequenceInfo.span(2, 2, 7), history=history)
    changed = history.detach().clone()
    changed[:, 0] = torch.nan  # belongs to the document before
    assert conv(x, weight, SequenceInfo.span(2, 2, 7), history=changed).equal(start)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_segments_chained_equal_the_whole(width):
    whole = SequenceInfo.span(2, 0, 9)
    x, weight, _ = inputs(whole, width)
    conv, reach, parts = FragmentConv(), width - 1, []
    padded = torch.cat([torch.zeros(2, reach, CHANNELS, dtype=x.dtype), x], dim=1)
    for start, stop in ((0, 2), (2, 3), (3, 9)):
        history = padded[:, start : start + reach]
        info = SequenceInfo.span(2, start, stop)
        parts.append(conv(x[:, start:stop], weight, info, history=history))
    assert_equal([torch.cat(parts, dim=1)], [conv(x, weight, whole)], 1e-12)


def test_sums_are_wider_than_bf16():
    info = INFOS["scattered"]
    narrow = inputs(info, dtype=torch.bfloat16)
    wide = [x.detach().double() for x in narrow]
    conv = FragmentConv()
    got = conv(*narrow[:2], info, history=narrow[2])
    expected = conv(*wide[:2], info, history=wide[2])
    assert got.equal(expected.bfloat16())


def test_flat_sequences_for_fla():
    rows = SequenceInfo.from_lengths([[2, 3], [5]])
    assert _conv_bounds(rows, 0, torch.device("cpu")).tolist() == [0, 2, 5, 10]
    # Three tokens of history in front of each row, none of which a new document sees.
    assert _conv_bounds(rows, 3, torch.device("cpu")).tolist() == [0, 3, 5, 8, 11, 16]
    rows = SequenceInfo.span(2, 1, 6)  # sees one
    assert _conv_bounds(rows, 3, torch.device("cpu")).tolist() == [0, 2, 8, 10, 16]
