"""Distillation on the logits in tiles against the whole logits, and layer by layer against autograd
through everything."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.hybrid import HybridLM
from tests.models.build import make_model, randomise
from tests.trainer.test_loss import DIM, VOCAB, TinyModel, gradients, make_batch
from trainer.batch import IGNORE_INDEX, Batch, Run
from trainer.distillation import DistillationLoss
from trainer.layerwise import LayerwiseLoss
from trainer.teacher import Teacher

MIX = [(1.0, 0.0), (1.0, 0.3), (2.5, 0.0), (2.5, 0.3), (1.7, 1.0)]
LAYERS = ["model.d_model=12", "model.num_layers=3", "model.ffn.hidden=8", "model.moe=null"]
GQA = ["mixer.gqa.num_heads=2", "mixer.gqa.num_kv_heads=1", "mixer.gqa.head_dim=4"]
KDA = ["mixer.kda.num_heads=2", "mixer.kda.head_dim=4"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def wider() -> TinyModel:
    model = TinyModel()
    model.embed = torch.nn.Embedding(VOCAB, 2 * DIM)
    model.mix = torch.nn.Linear(2 * DIM, DIM + 3)
    model.head = torch.nn.Linear(DIM + 3, VOCAB, bias=False)
    return model


def as_teacher(model: torch.nn.Module) -> Teacher:
    return Teacher(cast(HybridLM, model))


def whole(model: TinyModel, teacher: TinyModel, batch: Batch, t: float, ce_weight: float) -> Tensor:
    """The definition; [tokens]."""
    logits, aims = (m(batch.tokens, batch.info) @ m.head_weight.mT for m in (model, teacher))
    wanted, found = ((x.flatten(0, 1) / t).log_softmax(-1) for x in (aims.detach(), logits))
    kl = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1)
    labels = batch.labels.flatten()
    ce = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    return ((1 - ce_weight) * t**2 * kl + ce_weight * ce)[labels != IGNORE_INDEX]


@pytest.mark.parametrize(("temperature", "ce_weight"), MIX)
@pytest.mark.parametrize(("tile", "tied"), [(1, True), (4, False), (1000, True)])
def test_equals_the_whole_logits(temperature, ce_weight, tile, tied):
    model, teacher, batch = TinyModel(tied=tied).double(), wider().double(), make_batch()
    options = {"temperature": temperature, "ce_weight": ce_weight, "tile": tile}
    loss = DistillationLoss(model, teacher=as_teacher(teacher), **options)
    expected = whole(model, teacher, batch, temperature, ce_weight).sum()
    got = loss(batch)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        gradients(model, got * 0.37), gradients(model, expected * 0.37), rtol=1e-10, atol=1e-13
    )
    assert all(p.grad is None for p in teacher.parameters())


def test_tells_its_parts_and_scores_like_the_language_model():
    model, teacher, batch = TinyModel().double(), wider().double(), make_batch()
    loss = DistillationLoss(model, teacher=as_teacher(teacher), temperature=2.0, ce_weight=0.25)
    total = loss(batch) + loss(batch)
    parts = loss.take_sums()
    assert loss.take_sums() == {}
    kl, ce = (whole(model, teacher, batch, 2.0, w).sum() for w in (0.0, 1.0))
    torch.testing.assert_close(parts["kl"], 2 * kl.detach() / 4)
    torch.testing.assert_close(parts["cross_entropy"], 2 * ce.detach())
    torch.testing.assert_close(total, 1.5 * kl + 0.5 * ce)
    torch.testing.assert_close(loss(batch, scores=True).loss.sum(), ce.detach())


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    model, batch = TinyModel().double(), make_batch()
    teacher = TinyModel().double()
    teacher.load_state_dict(model.state_dict())
    loss = DistillationLoss(model, teacher=as_teacher(teacher), tile=4)(batch)
    assert loss.abs() < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients(model, loss))


def test_without_labels_all_gradients_are_exact_zeros():
    model, teacher = TinyModel(), wider()
    loss = DistillationLoss(model, teacher=as_teacher(teacher), ce_weight=0.5, tile=4)
    got = loss(make_batch(valid=False))
    assert got.item() == 0 and got.dtype == torch.float32
    assert all((grad == 0).all() for grad in gradients(model, got))


def test_logits_of_neither_exist_at_once():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                seen.append(out.numel())
            return out

    loss = DistillationLoss(TinyModel().double(), teacher=as_teacher(wider().double()), tile=4)
    with Watch():
        loss(make_batch()).backward()
    assert 4 * VOCAB in seen and 21 * VOCAB not in seen


def rows() -> Batch:
    """Two rows of packed documents, one of them with padding."""
    generator = torch.Generator().manual_seed(2)
    runs = [Run(torch.randint(320, (n,), generator=generator).numpy(), 5) for n in (9, 7, 11)]
    return Batch.from_rows([runs[:2], runs[2:]], seq_len=16, pad_id=257)


def hybrid(*words: str, spread: float = 1.0) -> HybridLM:
    model = randomise(make_model([*LAYERS, *GQA, *KDA, *words], device="cpu").double())
    return model if spread == 1 else _scale(model, spread)


def _scale(model: HybridLM, factor: float) -> HybridLM:
    for parameter in model.parameters():
        parameter.data *= factor
    return model


def layer_by_layer(model: HybridLM, teacher: HybridLM, batch: Batch, norm: str) -> Tensor:
    """The definition: [layers, layer and mixer], by calls of the parts alone."""
    x, valid = teacher.embed(batch.tokens), batch.labels != IGNORE_INDEX
    found = []
    for layer, guide in zip(model.layers, teacher.layers, strict=True):
        mixers = [m.mixer(m.mixer_norm(x), batch.info) for m in (layer, guide)]
        outputs = [m((x,), batch.info)[0] for m in (layer, guide)]
        for own, aim in (outputs, mixers):
            apart = (own - aim.detach())[valid]
            if norm == "l2":
                found.append(apart.norm(dim=-1).sum())
            else:
                found.append((apart.square().mean(-1) / aim[valid].square().mean(-1)).sum())
        x = outputs[1].detach()
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_layers_learn_alone(norm):
    teacher, batch = hybrid("model.pattern=[gqa]").requires_grad_(False), rows()
    model = hybrid("model.pattern=[kda,gqa]", spread=0.9)
    expected = layer_by_layer(model, teacher, batch, norm)
    before = torch.autograd.grad(expected.sum() * 0.37, list(model.layers.parameters()))
    loss = LayerwiseLoss(model, teacher=Teacher(teacher), norm=norm)
    got = loss(batch)
    torch.testing.assert_close(got, expected.sum(), rtol=1e-12, atol=0)
    parts = torch.stack([*loss.take_sums().values()]).view(-1, 2)
    torch.testing.assert_close(parts, expected.detach(), rtol=1e-12, atol=0)
    (got * 0.37).backward()
    layers = [p.grad for p in model.layers.parameters()]
    torch.testing.assert_close(layers, list(before), rtol=1e-10, atol=1e-13)
    rest = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert rest == {"embed.weight", "norm.weight", "head.weight"}
    assert all(p.grad is None for n, p in model.named_parameters() if n in rest)


def test_the_inputs_of_layers_alone_wait_for_the_backward_pass():
    kept = []
    teacher, batch = hybrid("model.pattern=[gqa]"), rows()
    loss = LayerwiseLoss(hybrid("model.pattern=[kda]"), teacher=Teacher(teacher))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        loss(batch)
    tokens = batch.tokens.numel()
    assert [size for size in kept if size >= tokens] == [tokens * 12] * 3


def test_layers_of_the_teacher_itself_are_at_no_distance():
    teacher, batch = hybrid("model.pattern=[gqa]"), rows()
    for norm in ("mse", "l2"):
        model = hybrid("model.pattern=[gqa]")
        loss = LayerwiseLoss(model, teacher=Teacher(teacher), norm=norm)(batch)
        loss.backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.layers.parameters())


def test_flops_are_those_of_both_models():
    model, teacher = hybrid("model.pattern=[kda]"), hybrid("model.pattern=[gqa]")
    own, its, head = model.flops_per_token(9), teacher.flops_per_token(9), 2 * 320 * 12
    kd = DistillationLoss(model, teacher=Teacher(teacher))
    assert kd.flops_per_token(model, 9) == 3 * own + its
    ild = LayerwiseLoss(model, teacher=Teacher(teacher))
    assert ild.flops_per_token(model, 9) == 3 * (own - head) + its - head
