"""Kimi Linear against transformers: the same weights give the same logits and gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import KimiLinearForCausalLM, PreTrainedModel

from models.hybrid import HybridLM
from models.ops.select import Ops
from models.sequence import SequenceInfo
from tests.models.checkpoints.oracle import SHAPES, make_peer, relative_error, save_gradients
from trainer.build import build_model
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import load_weights, open_weights

TOLERANCE = 1e-5
# Sums over all tokens that nearly cancel: transformers' fp32 is up to 3e-5 from our fp64 here.
RATE_TOLERANCE = 6e-5


def make_ours(folder: Path) -> HybridLM:
    config = open_weights(folder).config
    model = build_model(
        config["model"],
        config["mixer"],
        vocab_size=config["model"]["vocab_size"],
        ops=Ops(),
        device="cpu",
    )
    load_weights(model, folder)
    return model


def make_tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 96, (1, length), generator=generator)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """A loss that every position has a part in, the last one too."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flip(1).flatten(), reduction="sum")


def our_logits(model: HybridLM, tokens: Tensor, info: SequenceInfo) -> Tensor:
    return model(tokens, info) @ model.head_weight.mT


def check_gradients(model: HybridLM, peer: PreTrainedModel, folder: Path) -> None:
    save_gradients(peer, folder)
    saved = open_weights(folder)
    expected = {name: saved.get(name) for name, _ in model.named_parameters()}
    # A query that sees one key has no gradient beyond rounding: it is held to the large ones.
    floor = 1e-2 * max(gradient.norm().item() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        error = relative_error(parameter.grad, expected[name], floor)
        assert error < (RATE_TOLERANCE if "log_rate" in name else TOLERANCE), (name, error)


@pytest.mark.parametrize("length", [1, 63, 65, 130])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape, length, tmp_path):
    peer = make_peer(shape)
    peer.save_pretrained(tmp_path / "theirs")
    model = make_ours(tmp_path / "theirs")
    tokens = make_tokens(length)
    theirs = peer(tokens).logits
    ours = our_logits(model, tokens, SequenceInfo.from_lengths([[length]]))
    assert relative_error(ours, theirs) < TOLERANCE
    loss_of(theirs, tokens).backward()
    loss_of(ours, tokens).backward()
    check_gradients(model, peer, tmp_path / "gradients")


@pytest.mark.parametrize("shape", ["moe", "sparse"])
def test_packed_documents_equal_documents_alone(shape, tmp_path):
    peer = make_peer(shape)
    peer.save_pretrained(tmp_path / "theirs")
    model = make_ours(tmp_path / "theirs")
    documents = [make_tokens(length) for length in (63, 2, 65, 1)]
    info = SequenceInfo.from_lengths([[63, 2, 65, 1]])
    packed = our_logits(model, torch.cat(documents, dim=1), info).split([63, 2, 65, 1], dim=1)
    for ours, tokens in zip(packed, documents, strict=True):
        theirs = peer(tokens).logits
        assert relative_error(ours, theirs) < TOLERANCE
        loss_of(theirs, tokens).backward()
    losses = [loss_of(ours, tokens) for ours, tokens in zip(packed, documents, strict=True)]
    torch.stack(losses).sum().backward()
    check_gradients(model, peer, tmp_path / "gradients")


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_what_we_write(shape, tmp_path):
    make_peer(shape).save_pretrained(tmp_path / "theirs")
    convert(source=str(tmp_path / "theirs"), target=str(tmp_path / "native"), format="native")
    convert(source=str(tmp_path / "native"), target=str(tmp_path / "ours"), format="hf")
    peer, report = KimiLinearForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    model = make_ours(tmp_path / "native")
    tokens = make_tokens(65)
    ours = our_logits(model, tokens, SequenceInfo.from_lengths([[65]]))
    theirs = peer(tokens).logits
    assert relative_error(ours, theirs) < TOLERANCE
    loss_of(theirs, tokens).backward()
    loss_of(ours, tokens).backward()
    check_gradients(model, peer, tmp_path / "gradients")
    peer.save_pretrained(tmp_path / "again")
    first, again = open_weights(tmp_path / "theirs"), open_weights(tmp_path / "again")
    assert first.config == again.config
    for name in first.shapes:
        assert torch.equal(first.get(name), again.get(name)), name
