"""The choice of layers against all choices, and against what was published."""

import random
from itertools import combinations, pairwise

import pytest

from models.convert.selection import select_layers

PUBLISHED = {  # layers of the model -> those with latent attention, Zebra-Llama's configurations
    16: [[0, 5, 10, 14], [0, 2, 5, 8, 11, 14], [*range(0, 16, 2)]],
    28: [[0, 5, 10, 16, 21, 26], [0, 3, 7, 10, 14, 18, 22, 26], [*range(0, 28, 2)]],
    32: [[0, 4, 8, 12, 16, 20, 25, 30], [*range(0, 32, 2)]],
}


@pytest.mark.parametrize(
    ("depth", "layers"), [(depth, layers) for depth, lists in PUBLISHED.items() for layers in lists]
)
def test_published_lists_obey_the_rules(depth, layers):
    assert select_layers([float(i in layers) for i in range(depth)], len(layers)) == layers


def obeys(layers: tuple[int, ...], sensitivities: list[float]) -> bool:
    """The rules as they are told, apart from the sum."""
    depth, count = len(sensitivities), len(layers)
    block = depth // count
    head, tail = sensitivities[:block], sensitivities[depth - block :]
    if layers[0] != head.index(max(head)) or layers[-1] != depth - block + tail.index(max(tail)):
        return False
    if count == 1:
        return True
    even = (layers[-1] - layers[0]) / (count - 1)
    return all(abs(b - a - even) < 1 for a, b in pairwise(layers))


@pytest.mark.parametrize("depth", range(1, 12))
def test_is_the_best_of_all_choices(depth):
    generator = random.Random(depth)
    for count in range(1, depth + 1):
        for kind in ("any", "equal"):
            levels = [generator.gauss(0, 1) if kind == "any" else 1.0 for _ in range(depth)]
            layers = select_layers(levels, count)
            every = [c for c in combinations(range(depth), count) if obeys(c, levels)]
            assert tuple(layers) in every
            best = max(sum(levels[i] for i in c) for c in every)
            assert sum(levels[i] for i in layers) == pytest.approx(best, abs=1e-12)


def test_a_worse_neighbour_is_taken_where_the_spacing_asks_for_it():
    levels = [9.0, 0, 8, 0, 0, 0, 0, 9]  # the second best is too near the first
    assert select_layers(levels, 3) == [0, 4, 7]


@pytest.mark.parametrize(
    ("levels", "count", "line"),
    [
        ([1.0, 2.0], 0, "count is 0; allowed: 1 to 2, the number of layers"),
        ([1.0, 2.0], 3, "count is 3; allowed: 1 to 2, the number of layers"),
        ([1.0, float("nan")], 1, "the sensitivity of layer 1 is nan; allowed: a finite number"),
    ],
)
def test_bad_input_is_told(levels, count, line):
    with pytest.raises(ValueError, match=line):
        select_layers(levels, count)
