"""The adapters to flash-linear-attention, over stand-ins for its kernels: the same arguments, run
on the definitions. tests/gpu holds the kernels themselves to these."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

from models.ops.conv import ShiftedConv
from models.ops.decayed_sum import TokenLoopDecayedSum
from models.ops.delta_rule import TokenLoopDeltaRule
from models.ops.fla import FlaConv, FlaDecayedSum, FlaDeltaRule
from models.sequence import Response, SequenceInfo
from tests.helpers import INFOS, assert_equal, outputs_and_gradients, random_tensors

HEADS, DIM, CHANNELS, WIDTH = 2, 4, 3, 4


DELTA, DECAYED = TokenLoopDeltaRule(), TokenLoopDecayedSum()


def chunk_kda(q, k, v, g, beta, *, scale, initial_state, output_final_state, cu_seqlens, op=DELTA):
    """One sequence after the other; without a scale the kernel would choose its own."""
    assert scale == 1.0 and output_final_state and len(q) == 1
    outputs, states = [], []
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        part = (x[:, start:stop] for x in (q, k, v, g, beta))
        info = SequenceInfo.span(1, 1, 1 + stop - start)  # goes on: the state enters as it is
        state = None if initial_state is None else initial_state[i : i + 1]
        output, final = op(*part, info, initial_state=state)
        outputs.append(output)
        states.append(final)
    return torch.cat(outputs, dim=1), torch.cat(states)


def chunk_gated_delta_rule(q, k, v, g, beta, **keywords):
    """Decays are [1, seq, heads]."""
    return chunk_kda(q, k, v, g.unsqueeze(-1), beta, **keywords)


def chunk_simple_gla(q, k, v, g, *, scale, **keywords):
    ones = torch.ones_like(g)
    return chunk_kda(q, k, v, g.unsqueeze(-1), ones, scale=scale, op=DECAYED, **keywords)


def causal_conv1d(x, weight, *, cu_seqlens):
    assert len(x) == 1
    parts = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        info = SequenceInfo.span(1, 0, stop - start)
        parts.append(ShiftedConv()(x[:, start:stop], weight, info))
    return torch.cat(parts, dim=1), None


@pytest.fixture(autouse=True)
def package(monkeypatch):
    for name, function in (
        ("fla.ops.kda", chunk_kda),
        ("fla.ops.gated_delta_rule", chunk_gated_delta_rule),
        ("fla.ops.simple_gla", chunk_simple_gla),
        ("fla.modules.causal_conv1d", causal_conv1d),
    ):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


RECURRENCES = {
    "one decay a channel": (FlaDeltaRule(), DELTA, DIM),
    "one decay a head": (FlaDeltaRule(), DELTA, 1),
    "decayed sum": (FlaDecayedSum(), DECAYED, 1),
}


@pytest.mark.parametrize(("adapter", "definition", "decays"), RECURRENCES.values(), ids=RECURRENCES)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("name", INFOS)
def test_recurrence(name, with_state, adapter, definition, decays):
    info = INFOS[name]
    batch, seq = info.shape
    shapes = [(batch, seq, HEADS, DIM)] * 3 + [(batch, seq, HEADS, decays), (batch, seq, HEADS)]
    shapes.append((batch, HEADS, DIM, DIM))
    tensors = random_tensors(*shapes, dtype=torch.float32)

    def run(op):
        def call(q, k, v, log_decay, beta, state):
            tokens = q, 0.3 * k, v, -log_decay.square(), beta.sigmoid()
            return op(*tokens, info, initial_state=state if with_state else None)

        return outputs_and_gradients(call, tensors)

    assert_equal(run(adapter), run(definition), 1e-5)


@pytest.mark.parametrize(("adapter", "definition", "decays"), RECURRENCES.values(), ids=RECURRENCES)
@pytest.mark.parametrize("name", INFOS)
def test_recurrence_before_a_state_enters(name, adapter, definition, decays):
    batch, seq = INFOS[name].shape
    shapes = [(batch, seq, HEADS, DIM)] * 3 + [(batch, seq, HEADS, decays), (batch, seq, HEADS)]
    q, k, v, log_decay, beta = random_tensors(*shapes, dtype=torch.float32)
    tokens = q, 0.3 * k, v, -log_decay.square(), beta.sigmoid()
    got, expected = (
        op.response(*(x.detach() for x in tokens), INFOS[name]) for op in (adapter, definition)
    )
    assert_equal(numbers(got), numbers(expected), 1e-5)


def numbers(response: Response) -> list[Tensor]:
    return [response.reads, response.transition.tensor, response.update]


@pytest.mark.parametrize("with_history", [True, False])
@pytest.mark.parametrize("name", INFOS)
def test_conv(name, with_history):
    info = INFOS[name]
    batch, seq = info.shape
    shapes = (batch, seq, CHANNELS), (CHANNELS, WIDTH), (batch, WIDTH - 1, CHANNELS)
    tensors = random_tensors(*shapes)

    def run(op):
        return outputs_and_gradients(
            lambda x, weight, history: op(
                x, weight, info, history=history if with_history else None
            ),
            tensors,
        )

    assert_equal(run(FlaConv()), run(ShiftedConv()), 1e-12)
