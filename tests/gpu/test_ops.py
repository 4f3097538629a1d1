"""Every CUDA kernel in bf16, held to the definition in fp64.

The budget is twice the error that the definition makes on inputs rounded to bf16.
"""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.norm import RMSNorm
from models.ops.conv import ShiftedConv
from models.ops.decayed_sum import TokenLoopDecayedSum
from models.ops.delta_rule import TokenLoopDeltaRule
from models.ops.experts import LoopExperts
from models.ops.select import Ops
from models.ops.softmax import EinsumSoftmax
from models.sequence import Fragment, SequenceInfo
from tests.helpers import outputs_and_gradients, random_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
BF16, FP32 = torch.bfloat16, torch.float32

PACKED = SequenceInfo.from_lengths([[1, 63, 130, 6], [200]], padding=[56, 56])
CUT = SequenceInfo.from_fragments(
    [
        [Fragment(100, 300, 200), Fragment(60, 500, 400), Fragment(96, 560)],
        [Fragment(128, 64, 64), Fragment(127, 192, 192), Fragment(1, 400)],
    ]
)
PAIRS = {
    "packed": (PACKED, PACKED),
    "cut": (CUT, CUT),
    "decoding": (SequenceInfo.span(2, 150, 151), SequenceInfo.span(2, 0, 151)),
    "prefill": (SequenceInfo.span(2, 100, 151), SequenceInfo.span(2, 0, 151)),
    "before": (SequenceInfo.span(2, 100, 200), SequenceInfo.span(2, 0, 100)),
}


def needs(package: str):
    missing = find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def within_budget(kernel, definition, exact: list[Tensor], dtypes: list[torch.dtype]) -> None:
    """Outputs and every gradient; both take the tensors of `exact`, rounded to `dtypes`."""
    truth = outputs_and_gradients(definition, exact)
    rounded = [
        x.detach().to(dtype).requires_grad_() for x, dtype in zip(exact, dtypes, strict=True)
    ]
    budget = outputs_and_gradients(definition, rounded)
    got = outputs_and_gradients(kernel, rounded)
    for i, (x, y, z) in enumerate(zip(got, budget, truth, strict=True)):
        error, allowed = (x - z).norm(), 2 * (y - z).norm()
        assert error <= allowed, f"tensor {i}: {error} of {z.norm()}, allowed {allowed}"


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 50)])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (20, 12)])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", ["aten", pytest.param("flash", marks=needs("flash_attn"))])
def test_softmax(name, pair, dims, causal, window):
    info, key_info = (x.to(DEVICE) for x in PAIRS[pair])
    (batch, seq), key_seq = info.shape, key_info.shape[1]
    shapes = (batch, seq, 4, dims[0]), (batch, key_seq, 2, dims[0]), (batch, key_seq, 2, dims[1])
    op = Ops(softmax=name, device=DEVICE).softmax(causal=causal)
    definition = EinsumSoftmax(causal=causal)
    within_budget(
        lambda *x: op(*x, info, key_info=key_info, window=window),
        lambda *x: definition(*x, info, key_info=key_info, window=window),
        random_tensors(*shapes, device=DEVICE),
        [BF16] * 3,
    )
    q, k, v = random_tensors(*shapes, dtype=BF16, device=DEVICE)
    lse = op.block(q, k, v, info, key_info, window=window)[1]
    expected = definition.block(q, k, v, info, key_info, window=window)[1]
    torch.testing.assert_close(lse, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["aten", pytest.param("flash", marks=needs("flash_attn"))])
def test_softmax_takes_no_fp32(name):
    info = PACKED.to(DEVICE)
    tensors = random_tensors(*[(*info.shape, 2, 64)] * 3, dtype=FP32, device=DEVICE)
    with pytest.raises(ValueError, match="bf16 and fp16 only"):
        Ops(softmax=name, device=DEVICE).softmax()(*tensors, info)


@pytest.mark.parametrize("name", ["fused", pytest.param("fla", marks=needs("fla")), "reference"])
@pytest.mark.parametrize("info", [PACKED, CUT], ids=["packed", "cut"])
def test_conv(name, info):
    info = info.to(DEVICE)
    (batch, seq), channels, width = info.shape, 96, 4
    shapes = (batch, seq, channels), (channels, width), (batch, width - 1, channels)
    op = Ops(conv=name, device=DEVICE).conv()
    within_budget(
        lambda x, weight, history: op(x, weight, info, history=history),
        lambda x, weight, history: ShiftedConv()(x, weight, info, history=history),
        random_tensors(*shapes, device=DEVICE),
        [BF16] * 3,
    )


DELTA_RULES = ["chunked", pytest.param("fla", marks=needs("fla"))]
DELTA_DTYPES = [BF16] * 3 + [FP32] * 3


def recurrence_inputs(info: SequenceInfo, decays: int = 64) -> list[Tensor]:
    """q, k, v, log_decay, beta and an initial state; decays: per head."""
    (batch, seq), heads, dim = info.shape, 3, 64
    q, k, v, log_decay, beta, state = random_tensors(
        *[(batch, seq, heads, dim)] * 3,
        (batch, seq, heads, decays),
        (batch, seq, heads),
        (batch, heads, dim, dim),
        device=DEVICE,
    )
    exact = [F.normalize(q, dim=-1) * dim**-0.5, F.normalize(k, dim=-1), v]
    exact += [-F.softplus(log_decay - 2), beta.sigmoid(), state]
    return [x.detach().requires_grad_() for x in exact]


RECURRENCES = {"delta_rule": TokenLoopDeltaRule(), "decayed_sum": TokenLoopDecayedSum()}


@pytest.mark.parametrize(
    ("kind", "decays"), [("delta_rule", 64), ("delta_rule", 1), ("decayed_sum", 1)]
)
@pytest.mark.parametrize("name", DELTA_RULES)
@pytest.mark.parametrize(
    "info", [PACKED, CUT, SequenceInfo.span(2, 5, 205)], ids=["packed", "cut", "continued"]
)
def test_recurrence(name, info, kind, decays):
    info = info.to(DEVICE)

    def first(op):
        return lambda *x: op(*x[:5], info, initial_state=x[5])

    def later(op):
        return lambda *x: op.response(*x[:5], info).enter(x[5])

    op = getattr(Ops(**{kind: name}, device=DEVICE), kind)()
    exact = recurrence_inputs(info, decays)
    for run in (first, later):
        within_budget(run(op), first(RECURRENCES[kind]), exact, DELTA_DTYPES)


@pytest.mark.parametrize("name", DELTA_RULES)
def test_delta_rule_before_a_state_enters(name):
    info = SequenceInfo.span(2, 5, 205).to(DEVICE)

    def run(op, tensors: list[Tensor]) -> list[Tensor]:
        response = op.response(*tensors[:5], info)
        return [response.reads, response.transition.tensor, response.update]

    exact = recurrence_inputs(info)
    exact[3] = exact[3] / 20  # something is left of the first state
    rounded = [x.detach().to(dtype) for x, dtype in zip(exact, DELTA_DTYPES, strict=True)]
    got = run(Ops(delta_rule=name, device=DEVICE).delta_rule(), rounded)
    budget, truth = run(TokenLoopDeltaRule(), rounded), run(TokenLoopDeltaRule(), exact)
    for x, y, z in zip(got, budget, truth, strict=True):
        # fla multiplies in bf16 what the definition keeps in fp32: seen 2.1 times, of a transition.
        assert (x - z).norm() <= 3 * (y - z).norm()


def test_experts():
    tokens, experts, top_k, d_model, hidden = 300, 5, 2, 64, 96
    shapes = (
        (tokens, d_model),
        (tokens, top_k),
        (experts, 2 * hidden, d_model),
        (experts, d_model, hidden),
    )
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3))
    scores[:, 3] = -1  # no token chooses it
    indices = scores.topk(top_k).indices.to(DEVICE)
    op = Ops(device=DEVICE).experts()
    within_budget(
        lambda x, weights, *stacks: op(x, weights, indices, *stacks),
        lambda x, weights, *stacks: LoopExperts()(x, weights, indices, *stacks),
        random_tensors(*shapes, device=DEVICE),
        [BF16, FP32, BF16, BF16],
    )


def test_norm():
    norm = RMSNorm(256).to(DEVICE)

    def definition(x, weight):
        wide = x.to(torch.promote_types(x.dtype, FP32))
        return (F.rms_norm(wide, (256,), eps=norm.eps) * weight.to(wide.dtype)).to(x.dtype)

    def kernel(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    exact = random_tensors((64, 256), (256,), device=DEVICE)
    within_budget(kernel, definition, exact, [BF16, FP32])
