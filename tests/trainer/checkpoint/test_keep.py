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
    assert sorted(set(losses) - keep.surplus(losses)) == kept
