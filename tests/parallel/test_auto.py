"""parallel=auto: which scheme is taken where, and that the choice is explained."""

from dataclasses import replace

import pytest

from parallel.auto import Setting, decide
from parallel.shapes import LatentShape, RecurrenceShape, SoftmaxShape

GQA = SoftmaxShape(heads=64, kv_heads=8, dim=128, v_dim=128)
MQA = SoftmaxShape(heads=64, kv_heads=1, dim=128, v_dim=128)
MLA = LatentShape(heads=32, dim=192, rope=64, v_dim=128, rank=512)
KDA = RecurrenceShape(heads=32, key_dim=128, value_dim=128, decays=128, transition=128 * 128)
LONG, SHORT = 16384, 256


def choice(shapes, *, ranks: int, node: int = 8, tokens: int = LONG, ulysses: int | None = None):
    setting = Setting(ranks=ranks, node=node, tokens=tokens, size=2, ulysses=ulysses)
    return decide(shapes, setting)


@pytest.mark.parametrize(
    ("ranks", "node", "tokens", "scheme", "ulysses", "outer"),
    [
        (8, 8, LONG, "ulysses", 8, "ring"),
        (4, 8, LONG, "ulysses", 4, "ring"),
        (16, 8, LONG, "usp", 8, "ring"),
        (16, 8, SHORT, "usp", 8, "gather"),  # 2,048 tokens of a group, and 2,500 hide a hop
        (16, 16, LONG, "usp", 8, "ring"),  # no more ranks than key heads
        (12, 6, LONG, "usp", 2, "ring"),  # 8 heads in equal parts for ranks of one node
        (8, 1, LONG, "ring", 1, "ring"),
        (8, 1, SHORT, "gather", 1, "gather"),
    ],
)
def test_softmax(ranks, node, tokens, scheme, ulysses, outer) -> None:
    found = choice({GQA}, ranks=ranks, node=node, tokens=tokens)
    assert (found.softmax, found.ulysses, found.outer) == (scheme, ulysses, outer)


@pytest.mark.parametrize(
    ("ranks", "node", "scheme", "ulysses"),
    [
        (8, 8, "ulysses", 8),
        (16, 16, "usp", 8),  # 16 > 256 x 32 / 576: latents gathered whole would be more than keys
        (16, 8, "usp", 8),
        (8, 1, "gather", 1),
    ],
)
def test_latent(ranks, node, scheme, ulysses) -> None:
    found = choice({MLA, KDA}, ranks=ranks, node=node)
    assert (found.latent, found.ulysses, found.outer) == (scheme, ulysses, "gather")
    assert found.recurrence == "state_passing"


def test_routed_attention_is_softmax_of_which_a_part_travels() -> None:
    routed = replace(GQA, kept=0.25)
    found = choice({routed, KDA}, ranks=16)
    assert (found.softmax, found.ulysses) == ("usp", 8)
    dense = choice({GQA}, ranks=16).reasons["softmax"]
    assert "gather 3,840.00" in dense and "gather 960.00" in found.reasons["softmax"]


def test_an_operation_that_shares_heads_over_all_ranks_leaves_the_degree_to_others() -> None:
    few = SoftmaxShape(heads=4, kv_heads=2, dim=128, v_dim=128)
    found = choice({few, MLA}, ranks=8)
    assert (found.softmax, found.latent, found.ulysses) == ("usp", "ulysses", 2)
    found = choice({MQA, MLA}, ranks=8)
    assert (found.softmax, found.latent) == ("ring", "ulysses")
    dear = LatentShape(heads=8, dim=16, rope=8, v_dim=8, rank=128)  # as many values as its keys
    found = choice({GQA, dear}, ranks=8)
    assert (found.softmax, found.latent) == ("ulysses", "gather")


def test_a_given_degree_is_kept() -> None:
    found = choice({GQA, MLA}, ranks=8, ulysses=2)
    assert (found.softmax, found.latent, found.ulysses) == ("usp", "usp", 2)
    found = choice({MQA, MLA}, ranks=8, ulysses=8)
    assert (found.softmax, found.latent, found.ulysses) == ("ring", "ulysses", 8)


def test_reasons_tell_the_bytes_of_every_candidate() -> None:
    reasons = choice({GQA, MLA, KDA}, ranks=16).reasons
    assert list(reasons) == ["softmax", "latent", "recurrence"]
    for name in ("ring", "gather", "usp of 8"):
        assert name in reasons["softmax"] and name in reasons["latent"]
    assert "ulysses" not in reasons["softmax"]  # 8 key heads do not divide by 16
    assert "state_passing 174.00" in reasons["recurrence"]  # 29 x (4 + 2) MiB
