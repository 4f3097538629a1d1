import itertools
import random

import pytest

from tests.models.build import make_model
from trainer.build import row_cost
from trainer.data.balance import RowCost, imbalance, spread

SHAPES = [(1, 1, 6), (2, 1, 4), (4, 1, 16), (2, 4, 16), (4, 2, 64), (8, 1, 8)]  # ranks, size, rows


def heavy_tailed(count, seed):
    choose = random.Random(seed)
    return [1 + min(choose.paretovariate(1.2), 9) for _ in range(count)]


@pytest.mark.parametrize(("ranks", "size", "rows"), SHAPES)
def test_every_row_goes_somewhere_once_whatever_the_costs(ranks, size, rows):
    for costs in (heavy_tailed(rows, 0), [1.0] * rows, [0.0] * rows, list(map(float, range(rows)))):
        assert sorted(spread(costs, ranks=ranks, size=size)) == list(range(rows))


@pytest.mark.parametrize(("ranks", "size", "rows"), [s for s in SHAPES if s[0] > 1 and s[2] > s[0]])
def test_work_gets_more_even(ranks, size, rows):
    before, after = 0.0, 0.0
    for seed in range(50):
        costs = heavy_tailed(rows, seed)
        order = spread(costs, ranks=ranks, size=size)
        before += imbalance(costs, ranks=ranks) - 1
        after += imbalance([costs[i] for i in order], ranks=ranks) - 1
    assert after < 0.7 * before


def test_is_close_to_the_best_of_all_orders():
    for seed in range(20):
        costs = heavy_tailed(8, seed)
        best = min(
            max(sum(costs[i] for i in half), sum(costs) - sum(costs[i] for i in half))
            for half in itertools.combinations(range(8), 4)
        )
        order = spread(costs, ranks=2, size=1)
        found = max(sum(costs[i] for i in order[:4]), sum(costs[i] for i in order[4:]))
        assert found <= 1.1 * best


def test_micro_batches_of_one_time_have_like_costs():
    """Ranks that wait for each other in every micro-batch wait for little."""
    order = spread(list(map(float, range(16))), ranks=4, size=1)
    shares = [order[i : i + 4] for i in range(0, 16, 4)]
    for together in zip(*shares, strict=True):
        assert max(together) - min(together) == 3


def test_cost_of_a_row_is_that_of_its_positions_and_of_what_they_see():
    cost = RowCost(token=3.0, pair=0.5)
    assert cost.of_rows([[4, 2], []], 8) == [24 + 0.5 * (10 + 3), 24]
    model = make_model([])
    cost = row_cost(model)
    for context in (1, 100, 10_000):
        assert model.flops_per_token(context) == pytest.approx(cost.token + context * cost.pair)
    assert row_cost(make_model(["model.pattern=[kda]"])).pair == 0
