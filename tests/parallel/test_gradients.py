"""Gradients over ranks equal those of one process over all batches, for every parameter."""

import pytest
import torch

from tests.launch import fork
from tests.parallel.gradients_on_ranks import Loss, Model, batch

RANKS = 3


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    fork(RANKS, "tests.parallel.gradients_on_ranks", str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def test_sums_over_ranks_and_micro_batches(seen):
    torch.manual_seed(0)
    model = Model().double()
    for step in range(2):
        model.zero_grad()
        for rank in range(RANKS):
            for micro in range(3):
                (0.5 * Loss(model)(batch(rank, micro))).backward()
        expected = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rank in seen:
            torch.testing.assert_close(rank["grads"][step], expected, rtol=1e-12, atol=1e-12)
            assert rank["norms"][step] == pytest.approx(float(norm), rel=1e-12)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for rank in seen:
        torch.testing.assert_close(rank["end"], model.state_dict(), rtol=1e-12, atol=1e-12)


def test_ranks_agree_bitwise(seen):
    for rank in seen[1:]:
        torch.testing.assert_close(rank["end"], seen[0]["end"], rtol=0, atol=0)
        assert rank["norms"] == seen[0]["norms"]
    assert seen[0]["losses"] != seen[1]["losses"]


def test_only_the_last_micro_batch_communicates_and_always_in_one_order(seen):
    """From the last parameters to the first, in buckets closed at 40 bytes."""
    buckets = [2 + 4 * 2, 4 + 12, 5, 4 + 16]  # last, first, never, sometimes and tied
    for rank in seen:
        assert rank["sent"] == [[], [], buckets] * 2


def test_gradients_are_dropped_after_the_step(seen):
    assert not any(kept for rank in seen for step in rank["kept"] for kept in step)


def test_the_probe_finds_a_wrong_factor(seen):
    for rank in seen:
        assert "Engine reduces a gradient of 12.0 to" in rank["probe"]
