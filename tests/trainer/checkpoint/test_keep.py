"""Which checkpoints stay, by pure numbers."""

import math

import pytest

from trainer.checkpoint.keep import Keep

PLAIN = dict.fromkeys(range(1, 8))


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (Keep(), PLAIN, [1, 2, 3, 4, 5, 6, 7]),
        (Keep(newest=-1, every=3), PLAIN, [1, 2, 3, 4, 5, 6, 7]),
        (Keep(newest=2), PLAIN, [6, 7]),
        (Keep(newest=9), PLAIN, [1, 2, 3, 4, 5, 6, 7]),
        (Keep(newest=1, every=3), PLAIN, [3, 6, 7]),
        (Keep(newest=1, best=2), PLAIN, [7]),
        (Keep(newest=1, best=2), PLAIN | {2: 1.0, 3: 0.5, 5: 2.0}, [2, 3, 7]),
        (Keep(newest=1, best=1), PLAIN | {2: 0.5, 5: 0.5}, [5, 7]),
        (Keep(newest=1, best=3), PLAIN | {2: math.nan, 5: 0.5, 7: 0.1}, [5, 7]),
        (Keep(newest=2, every=4, best=1), PLAIN | {1: 0.1, 2: 0.2}, [1, 4, 6, 7]),
        (Keep(newest=2), {}, []),
    ],
)
def test_kept(keep, losses, kept):
    figures = {step: {"eval_loss": loss, "other": -step} for step, loss in losses.items()}
    assert sorted(set(losses) - keep.surplus(figures)) == kept


@pytest.mark.parametrize(("highest", "best"), [(True, [3, 6]), (False, [1, 4])])
def test_the_best_by_another_figure(highest, best):
    shares = {1: 0.1, 3: 0.9, 4: 0.1, 5: None, 6: 0.6, 7: 0.2}
    figures = {step: {"eval_loss": 1 / step, "share": x} for step, x in shares.items()} | {2: {}}
    keep = Keep(newest=1, best=2, metric="share", highest=highest)
    assert set(figures) - keep.surplus(figures) == {*best, 7}
