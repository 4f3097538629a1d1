"""Attention into linear mixers: queries, keys, values and output are the teacher's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.convert.gdn import to_gdn
from models.convert.kda import to_kda
from models.convert.mamba2 import to_mamba2
from models.mixer import Mixer
from models.sequence import SequenceInfo
from tests.models.convert.attention import inputs, make, teacher

WAYS = {"kda": to_kda, "gdn": to_gdn, "mamba2": to_mamba2}


def seen(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """Queries, keys and values that the recurrence gets, the former two of unit length."""
    caught: list[Tensor] = []
    mixer.recurrence.register_forward_pre_hook(lambda _, args: caught.extend(args[:3]))
    mixer(x, SequenceInfo.span(1, 0, x.shape[1]))
    q, k, v = caught
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]


@pytest.mark.parametrize("name", WAYS)
def test_the_recurrence_reads_the_teachers_heads(name):
    """With the convolution at the token itself, behind the activation."""
    source = teacher()
    made = WAYS[name](source.section, source.tensors, "identity")
    mixer = make(made.section)
    if name == "mamba2":
        mixer.conv_bias.data.zero_()
    before = {key: x.clone() for key, x in mixer.state_dict().items()}
    made.fill(mixer)
    x, _ = inputs()[0]
    heads = F.silu(x @ source.tensors["qkv_proj.weight"].T).unflatten(-1, (8, 8))
    q, k, v = heads.split([4, 2, 2], dim=2)
    k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
    expected = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]
    for found, should_be in zip(seen(mixer, x), expected, strict=True):
        torch.testing.assert_close(found, should_be, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixer.out_proj.weight, source.tensors["out_proj.weight"])
    kept = {key for key, x in mixer.state_dict().items() if torch.equal(x, before[key])}
    written = {"qkv_proj.weight", "in_proj.weight", "conv_weight", "out_proj.weight"}
    assert kept == set(before) - written


def test_gates_and_steps_of_mamba2_stay_as_they_were():
    source = teacher(qkv_bias=True)
    made = to_mamba2(source.section, source.tensors, "initial")
    mixer = make(made.section)
    before, taps = mixer.in_proj.weight.detach().clone(), mixer.conv_weight.detach().clone()
    made.fill(mixer)
    same = (mixer.in_proj.weight == before).all(1)
    gate, mixed, step = same.split(mixer.in_widths)
    assert gate.all() and step.all() and not mixed.any()
    assert torch.equal(mixer.conv_weight, taps)
    assert made.dropped == ("positions", "biases")
    assert made.section["num_kv_heads"] == 2 and made.section["num_groups"] == 4


def test_norms_and_gates_of_the_teacher_are_named_as_dropped():
    source = teacher(qk_norm=True, output_gate=True, rope_base=None)
    made = to_kda(source.section, source.tensors, "identity")
    assert made.dropped == ("norms of queries and keys", "output gate")
