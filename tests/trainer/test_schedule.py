"""Schedules at their corners; the numbers are worked out by hand."""

import itertools

import pytest

from trainer.schedule import constant, cosine, wsd


def test_wsd_warms_up_stays_and_falls():
    factors = [wsd(s, total_steps=20, warmup=0.2, decay=0.25, final=0.1) for s in range(1, 23)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:15] == [1.0] * 11
    assert factors[15:20] == pytest.approx([0.1 + 0.9 * left / 6 for left in (5, 4, 3, 2, 1)])
    assert factors[20:] == [0.1, 0.1]


def test_cosine_ends_at_its_floor():
    factors = [cosine(s, total_steps=10, warmup=0.2, final=0.1) for s in range(1, 13)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[5] == pytest.approx(0.55)  # half way
    assert factors[9:] == pytest.approx([0.1] * 3)
    assert all(a > b for a, b in itertools.pairwise(factors[1:10]))


def test_constant_only_warms_up():
    assert [constant(s, total_steps=10, warmup=0.3) for s in (1, 3, 4, 50)] == [1 / 3, 1, 1, 1]


@pytest.mark.parametrize("schedule", [wsd, cosine, constant])
def test_no_warmup_starts_at_the_full_rate(schedule):
    assert schedule(1, total_steps=1000, warmup=0.0) == pytest.approx(1.0, abs=1e-5)


def test_bad_shares_are_refused():
    with pytest.raises(ValueError, match=r"warmup is 2; allowed: 0 to 1"):
        constant(1, total_steps=10, warmup=2)
    with pytest.raises(ValueError, match=r"warmup \+ decay is 1.2"):
        wsd(1, total_steps=10, warmup=0.7, decay=0.5)
    with pytest.raises(ValueError, match="total_steps is 0"):
        cosine(1, total_steps=0)
