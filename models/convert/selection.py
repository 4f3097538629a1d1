"""Which layers of a hybrid get the costlier mixer: SMART, Zebra-Llama (arXiv 2505.17272).

Of L layers N are chosen by their sensitivities, what the model gains where one is exchanged:
1. the first of them is the most sensitive of the first floor(L / N) layers, the last one that of
   the last floor(L / N), and of equals the earliest;
2. neighbours are floor(g) or ceil(g) layers apart, where g is the even distance, that from the
   first to the last over N - 1;
3. of all that obey both, it is the set with the largest sum of sensitivities.

All layer lists published for the 1B, 3B and 8B models obey 1 and 2 for sensitivities that are
largest on them.
"""

import math
from collections.abc import Sequence


def select_layers(sensitivities: Sequence[float], count: int) -> list[int]:
    """-> `count` layers in ascending order, exact.

    Of sets with equal sums it is the last one in the order of lists. Raises ValueError for a count
    that is not 1 to the number of layers, and for sensitivities that are not finite.
    """
    depth = len(sensitivities)
    if not 1 <= count <= depth:
        raise ValueError(f"count is {count}; allowed: 1 to {depth}, the number of layers")
    for layer, x in enumerate(sensitivities):
        if not math.isfinite(x):
            raise ValueError(f"the sensitivity of layer {layer} is {x}; allowed: a finite number")
    first, last = terminals(sensitivities, count)
    if count == 1:
        return [first]
    gaps = spacings(first, last, count)
    # best[layer]: the largest sum of a chain from `first` to `layer`, and the chain.
    best = {first: (sensitivities[first], [first])}
    for _ in range(count - 1):
        longer: dict[int, tuple[float, list[int]]] = {}
        for layer, (total, chain) in best.items():
            for reached in {layer + gap for gap in gaps}:
                if reached <= last:
                    new = (total + sensitivities[reached], [*chain, reached])
                    longer[reached] = max(longer.get(reached, new), new)
        best = longer
    return best[last][1]


def terminals(sensitivities: Sequence[float], count: int) -> tuple[int, int]:
    """The first and the last layer of the choice; one layer if that is the count."""
    depth, block = len(sensitivities), len(sensitivities) // count
    first = max(range(block), key=sensitivities.__getitem__)
    last = max(range(depth - block, depth), key=sensitivities.__getitem__)
    return first, last


def spacings(first: int, last: int, count: int) -> tuple[int, int]:
    """How far neighbours may be apart; both are one where the layers divide evenly."""
    span = last - first
    return span // (count - 1), -(-span // (count - 1))
