"""Mixed precision: outside islands a parameter is read in the dtype of products, whoever casts it.

So an engine may hand a layer its parameters in bf16 already, its islands' in fp32, and nothing
changes: neither outputs nor gradients, to the last bit.
"""

import pytest
import torch
from torch import Tensor, nn

from models.precision import Island
from models.sequence import SequenceInfo
from tests.models.build import MIXERS, make_mixer, make_model, randomise
from tests.models.test_hybrid import TINY
from tests.models.test_mixers import OPTIONS

INFO = SequenceInfo.from_lengths([[5, 43], [48]])


def narrow(module: nn.Module) -> list[str]:
    """Casts what is not in an island to bf16, in place; -> the names of what is."""
    islands = {p for m in module.modules() if isinstance(m, Island) for p in m.parameters()}
    for parameter in set(module.parameters()) - islands:
        parameter.data = parameter.data.bfloat16()
    return [name for name, parameter in module.named_parameters() if parameter in islands]


def results(module: nn.Module, *inputs: object) -> list[Tensor]:
    """Output and gradients, all under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        output = module(*inputs)
    output = output if isinstance(output, Tensor) else torch.stack(output)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(output.shape, generator=generator).to(output.dtype)
    return [output, *(g.float() for g in torch.autograd.grad(output, [*module.parameters()], grad))]


def assert_casts_itself(module: nn.Module, *inputs: object) -> list[str]:
    before = results(module, *inputs)
    wide = narrow(module)
    torch.testing.assert_close(results(module, *inputs), before, rtol=0, atol=0)
    return wide


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in MIXERS), *OPTIONS], ids=str)
def test_mixers_read_parameters_in_the_dtype_of_products(name, options):
    x = torch.randn(2, 48, 24, generator=torch.Generator().manual_seed(1))
    assert_casts_itself(make_mixer(name, **options).float(), x, INFO)


@pytest.mark.parametrize("experts", ["reference", "grouped"])
def test_layers_do_too(experts):
    """Router, norms, decay gates and queries over the residual stream are islands."""
    overrides = [*TINY, f"ops.experts={experts}", "model.residual_block=2", "model.dense_layers=0"]
    model = randomise(make_model(["model=kimi_linear", *overrides], device="cpu"))
    stream = torch.randn(2, 2, 48, 16, generator=torch.Generator().manual_seed(1)).unbind()
    assert assert_casts_itself(model.layers[0], stream, INFO) == [
        "mixer_residual.query",
        "mixer_residual.norm.weight",
        "ffn_residual.query",
        "ffn_residual.norm.weight",
        "mixer_norm.weight",
        "mixer.decay.gate.log_rate",
        "mixer.decay.gate.bias",
        "mixer.out_norm.weight",
        "ffn_norm.weight",
        "ffn.router.weight",
    ]
