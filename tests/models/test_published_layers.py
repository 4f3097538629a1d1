"""Mixers against layers of transformers: the same weights give the same outputs and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig, Qwen3NextConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from models.mixer import Mixer
from models.sequence import SequenceInfo
from tests.models.build import make_mixer, randomise
from tests.models.checkpoints.oracle import Wide, relative_error

D_MODEL, HEADS, DIM, SEQ = 24, 4, 8, 150  # transformers' layers have a batch of one length

Tensors = dict[str, Tensor]


def gated_delta_net() -> tuple[nn.Module, Mixer, Callable[[Tensors], Tensors]]:
    """Two heads of queries and keys, whose rows come with those of the values that they serve."""
    config = Qwen3NextConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=2,
        linear_key_head_dim=DIM,
        linear_value_head_dim=2 * DIM,
        linear_conv_kernel_dim=3,
        rms_norm_eps=1e-4,
        layer_types=["linear_attention"],
    )
    sizes = {"num_heads": HEADS, "num_key_heads": 2, "head_dim": DIM, "conv_width": 3}

    def translate(theirs: Tensors) -> Tensors:
        widths = [DIM, DIM, 4 * DIM, 4 * DIM]
        grouped = theirs["in_proj_qkvz.weight"].view(2, -1, D_MODEL).split(widths, dim=1)
        q, k, v, gate = (x.flatten(0, 1) for x in grouped)
        beta, decay = theirs["in_proj_ba.weight"].view(2, 2, 2, D_MODEL).unbind(1)
        return {
            "qkv_proj.weight": torch.cat((q, k, v)),
            "gate_proj.weight": gate,
            "beta_proj.weight": beta.flatten(0, 1),
            "decay.proj.weight": decay.flatten(0, 1),
            "conv_weight": theirs["conv1d.weight"].squeeze(1),
            "decay.gate.log_rate": theirs["A_log"],
            "decay.gate.bias": theirs["dt_bias"],
            "out_norm.weight": theirs["norm.weight"],
            "out_proj.weight": theirs["out_proj.weight"],
        }

    ours = make_mixer("gdn", expand_v=2.0, norm_eps=1e-4, **sizes)
    return Qwen3NextGatedDeltaNet(config, 0), ours, translate


def lightning() -> tuple[nn.Module, Mixer, Callable[[Tensors], Tensors]]:
    """Layer 3 of 6, whose decays are neither the fastest nor the slowest."""
    config = MiniMaxConfig(
        hidden_size=D_MODEL,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        head_dim=DIM,
        block_size=32,
    )

    def translate(theirs: Tensors) -> Tensors:
        by_head = theirs["qkv_proj.weight"].view(HEADS, 3, DIM, D_MODEL)
        return {
            "qkv_proj.weight": by_head.transpose(0, 1).flatten(0, 2),
            "gate_proj.weight": theirs["output_gate.weight"],
            "out_norm.weight": theirs["norm.weight"],
            "out_proj.weight": theirs["out_proj.weight"],
        }

    ours = make_mixer("lightning", num_heads=HEADS, head_dim=DIM, norm_eps=1e-6)
    ours.place = 3, 6
    return MiniMaxLightningAttention(config, 3), ours, translate


# Their lightning attention has its decays from fp32.
@pytest.mark.parametrize(("make", "tolerance"), [(gated_delta_net, 1e-10), (lightning, 1e-6)])
def test_outputs_and_gradients_are_those_of_transformers(make, tolerance):
    peer, ours, translate = make()
    peer = randomise(peer).double()
    ours.load_state_dict(translate(dict(peer.named_parameters())))
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(2, 2, SEQ, D_MODEL, generator=generator).double()
    found = []
    for layer in (lambda x: peer(x, None, None), lambda x: ours(x, SequenceInfo.span(2, 0, SEQ))):
        x = x.detach().requires_grad_()
        with Wide():
            output = layer(x)
            output = output[0] if isinstance(output, tuple) else output
            (output * weight).sum().backward()
        found.append({"output": output, "x": x.grad})
    named = {name: p.grad for name, p in peer.named_parameters()}
    theirs = found[0] | translate(named)
    got = found[1] | {name: p.grad for name, p in ours.named_parameters()}
    assert got.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert relative_error(got[name], expected) < tolerance, name
