"""What the metrics say of routed layers, and the budget that a bias holds them to."""

import pytest
import torch

from parallel.mesh import Mesh
from tests.trainer.tiny import build
from trainer.shares import routed_imbalance

NATS_L = ["model=nats_l", "model.pattern=[kda,nats_l]"]
HEADS = [f"softmax_share/{layer}/{head}" for layer in (1, 3) for head in (0, 1)]


def test_shares_are_those_of_the_valid_tokens_of_a_step(tmp_path):
    trainer = build(tmp_path, *NATS_L, "mixer.nats_l.softmax_target=0.9")
    layers = trainer.engine.model.layers
    routers, counted = [layers[i].mixer.router for i in (1, 3)], []
    for router in routers:
        update = router.update_bias
        router.update_bias = lambda counts, rate, update=update: (
            counted.append(counts[:4].unflatten(0, (2, 2)).clone()),
            update(counts, rate),
        )
    batches = trainer.loader.stream.next_step()
    trainer.loader.stream.restore(build(tmp_path).loader.stream.state())
    record = trainer.train_step()
    shares = [float(kept / (kept + written)) for x in counted for kept, written in x.tolist()]
    assert [record[head] for head in HEADS] == pytest.approx(shares)
    assert record["softmax_share"] == pytest.approx(sum(shares) / 4)
    valid = sum(int(batch.info.valid.sum()) for batch in batches)
    assert [x.sum(1).tolist() for x in counted] == 2 * [[valid, valid]]
    assert all(router.bias > 0 for router in routers)  # towards more than the half of the start


def test_work_of_ranks_is_compared(tmp_path, monkeypatch):
    model = build(tmp_path, *NATS_L).engine.model
    mesh = Mesh(device=torch.device("cpu"), rank=1, ranks=2)
    other = torch.tensor([2.0, 0.0])
    monkeypatch.setattr("trainer.shares.sum_over_ranks", lambda pairs, _: pairs.add_(other))
    for layer in (1, 3):
        model.layers[layer].mixer.attention.pairs = 3
    assert routed_imbalance(model, mesh) == {"routed_imbalance": 1.5}  # 2 and 6
    assert routed_imbalance(model, mesh) == {"routed_imbalance": 2.0}  # counted anew: 2 and 0
    other.zero_()
    assert routed_imbalance(model, mesh) == {"routed_imbalance": 1.0}


def test_other_models_have_no_shares(tmp_path):
    assert "softmax_share" not in build(tmp_path).train_step()
