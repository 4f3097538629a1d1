"""The tiled loss against the whole logits: sum, token losses and the gradient of everything."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sequence import SequenceInfo
from trainer.batch import Batch
from trainer.loss import LanguageModelLoss

DIM, VOCAB = 6, 11


class TinyModel(nn.Module):
    """What the loss needs of a model."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.head = None if tied else nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: Tensor, info: SequenceInfo) -> Tensor:
        return self.mix(self.embed(tokens)).tanh() * 3

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight


def make_batch(*, valid: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (3, 7), generator=generator)
    labels = torch.randint(VOCAB, (3, 7), generator=generator)
    labels[0, 2:5] = labels[2, -1] = -100
    if not valid:
        labels.fill_(-100)
    info = SequenceInfo.from_lengths([[7]] * 3)
    return Batch(tokens, labels, info, int((labels != -100).sum()))


def whole(model: TinyModel, batch: Batch) -> Tensor:
    logits = model(batch.tokens, batch.info) @ model.head_weight.mT
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tile", [1, 4, 21, 1000])
def test_equals_the_whole_logits(tile, tied):
    model, batch = TinyModel(tied=tied).double(), make_batch()
    loss = LanguageModelLoss(model, tile=tile)
    expected = whole(model, batch)
    # Not scaled by one: the gradients that the forward pass left must be scaled once.
    torch.testing.assert_close(
        gradients(model, loss(batch) * 0.37),
        gradients(model, expected.sum() * 0.37),
        rtol=1e-12,
        atol=1e-13,
    )
    torch.testing.assert_close(loss(batch), expected.sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("tile", [1, 4, 1000])
def test_scores_of_every_token(tile):
    model, batch = TinyModel().double(), make_batch()
    likeliest = (model(batch.tokens, batch.info) @ model.head_weight.mT).argmax(-1)
    batch.labels[1, :4] = likeliest[1, :4]
    scores = LanguageModelLoss(model, tile=tile)(batch, scores=True)
    expected = whole(model, batch).detach().view_as(batch.labels)
    torch.testing.assert_close(scores.loss, expected, rtol=1e-12, atol=0)
    assert torch.equal(scores.hit, likeliest == batch.labels) and scores.hit[1, :4].all()
    assert not scores.hit[batch.labels == -100].any() and not scores.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_labels_all_gradients_are_exact_zeros(dtype):
    model = TinyModel().to(dtype)
    loss = LanguageModelLoss(model, tile=4)(make_batch(valid=False))
    assert loss.item() == 0 and loss.dtype == dtype
    assert all((grad == 0).all() for grad in gradients(model, loss))


def test_bf16_keeps_the_softmax_and_the_sums_in_fp32():
    """Within twice the error of the same model whose logits come whole in bf16, softmax in fp32."""
    model, batch = TinyModel(), make_batch()
    loss = LanguageModelLoss(model, tile=4, autocast=torch.bfloat16)(batch)
    assert loss.dtype == torch.float32
    exact = gradients(model, whole(model, batch).sum())
    got = gradients(model, loss)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.tokens, batch.info) @ model.head_weight.mT
    logits = logits.float().flatten(0, 1)
    peer = gradients(model, F.cross_entropy(logits, batch.labels.flatten(), reduction="sum"))
    for name, x, y, z in zip(dict(model.named_parameters()), got, peer, exact, strict=True):
        assert x.dtype == torch.float32
        assert (x - z).norm() <= 2 * (y - z).norm(), name


def test_logits_never_exist_at_once(monkeypatch):
    """No tensor of the loss is larger than a tile of logits or the inputs themselves."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                seen.append(out.numel())
            return out

    model, batch = TinyModel().double(), make_batch()
    with Watch():
        LanguageModelLoss(model, tile=4)(batch).backward()
    assert 4 * VOCAB in seen and 21 * VOCAB not in seen


def test_a_tile_holds_a_token():
    with pytest.raises(ValueError, match="loss_tile is 0"):
        LanguageModelLoss(TinyModel(), tile=0)
