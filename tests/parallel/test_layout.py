"""Layouts as integers: what every plan must be, and what the balanced one must be better at."""

import random
from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from models.sequence import Fragment
from parallel.chains import chains
from parallel.layout import TokenLayout, area, plan_layout

STRATEGIES = ("balanced", "zigzag", "contiguous")


def packed(lengths: list[int], padding: tuple[int, ...] = ()) -> list[Fragment]:
    """Documents of these lengths, and padding behind those of these places."""
    documents, index = [], 0
    for place, length in enumerate(lengths):
        documents.append(Fragment(length, index))
        index += length
        if place in padding:
            documents.append(Fragment(place % 5 + 1, index, padding=True))
            index += documents[-1].length
    return documents


def random_documents(generator: random.Random) -> list[Fragment]:
    """Few or many, short or long, equal or not, with padding between them or without."""
    count, longest = generator.choice([1, 2, 5, 20, 60]), generator.choice([1, 3, 20, 300])
    lengths = [generator.randint(1, longest) for _ in range(count)]
    lengths[0] *= generator.choice([1, 1, 10])
    padded = generator.random() * generator.choice([0, 1])
    return packed(lengths, tuple(i for i in range(count) if generator.random() < padded))


def holders(layout: TokenLayout) -> dict[int, set[int]]:
    """Ranks by the start of the document."""
    found = defaultdict(set)
    for rank, row in enumerate(layout.ranks):
        for fragment in row:
            if not fragment.padding:
                found[fragment.start].add(rank)
    return found


def check(layout: TokenLayout, documents: list[Fragment], multiple: int) -> None:
    """A partition, in rows of equal length, each sorted, cut only where that is allowed."""
    real = {d.start: d for d in documents if not d.padding}
    size = sum(f.length for f in layout.ranks[0])
    assert size % multiple == 0
    held = []
    for rank, row in enumerate(layout.ranks):
        assert sum(f.length for f in row) == size and all(f.length > 0 for f in row)
        assert [f.index for f in row] == sorted(f.index for f in row)
        for fragment in row:
            if not fragment.padding:
                document, end = real[fragment.start], fragment.position + fragment.length
                assert fragment.position % multiple == 0
                assert end == document.length or (end < document.length and not end % multiple)
        held.append(layout.index(rank))
        info = layout.info(rank)
        assert info.peers == layout.ranks and info.fragments == (layout.ranks[rank],)
        assert np.array_equal(held[-1] >= 0, info.valid[0].numpy())
        assert np.array_equal(held[-1][held[-1] >= 0], info.index[info.valid].numpy())
    tokens = np.sort(np.concatenate(held))
    wanted = [np.arange(d.index, d.index + d.length) for d in real.values()]
    assert np.array_equal(tokens[tokens >= 0], np.sort(np.concatenate([*wanted, []])))
    made = sorted((f.index, f.length) for row in layout.ranks for f in row if f.padding)
    end = documents[-1].index + documents[-1].length
    for index, length in made:  # indices of its own, behind everything
        assert index == end
        end += length


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_laws_on_random_documents(strategy):
    generator = random.Random(0)
    for trial in range(300):
        documents = random_documents(generator)
        ranks, multiple = trial % 8 + 1, generator.choice([1, 1, 4, 64])
        layout = plan_layout(documents, ranks=ranks, strategy=strategy, multiple=multiple)
        check(layout, documents, multiple)
        assert layout == plan_layout(documents, ranks=ranks, strategy=strategy, multiple=multiple)
        size = len(layout.index(0))
        mean = -(-sum(d.length for d in documents) // ranks)
        if multiple == 1:
            assert size <= mean + (strategy == "zigzag")  # 2 x ranks chunks, each rounded up
        else:
            assert size <= mean + 5 * multiple


def test_laws_where_documents_that_fit_are_cut(monkeypatch):
    """As at long context, in small: the planner goes as far as it can."""
    monkeypatch.setattr("parallel.balance._UNEVEN", 0)
    monkeypatch.setattr("parallel.balance._SHARE", 16)
    generator = random.Random(7)
    for trial in range(300):
        documents = random_documents(generator)
        ranks, multiple = trial % 8 + 1, generator.choice([1, 1, 4, 64])
        check(plan_layout(documents, ranks=ranks, multiple=multiple), documents, multiple)


def test_documents_that_fit_stay_whole_where_there_is_room():
    """Half of the room is free, so that no order of packing can fail."""
    generator = random.Random(1)
    for ranks in (2, 3, 5, 8):
        lengths = [generator.randint(1, 40) for _ in range(60)]
        documents = packed(lengths)
        padding = Fragment(sum(lengths) + 40 * ranks, sum(lengths), padding=True)
        layout = plan_layout([*documents, padding], ranks=ranks)
        assert all(len(ranks) == 1 for ranks in holders(layout).values())
        assert layout.report().cut == 0


def fewest_cut(lengths: list[int], ranks: int, size: int) -> int:
    """By trying every rank, and being cut, for every document."""
    best = sum(lengths)
    for places in product(range(ranks + 1), repeat=len(lengths)):
        room = [size] * ranks + [best]
        for length, place in zip(lengths, places, strict=True):
            room[place] -= length
        if min(room) >= 0:
            best = min(best, sum(x for x, p in zip(lengths, places, strict=True) if p == ranks))
    return best


def test_nearly_the_fewest_tokens_are_in_cut_documents():
    generator = random.Random(2)
    found = optimum = total = 0
    for trial in range(60):
        ranks = trial % 2 + 2
        lengths = [generator.randint(1, 30) for _ in range(generator.randint(2, 6))]
        layout = plan_layout(packed(lengths), ranks=ranks)
        starts = {d.start: d.length for d in packed(lengths)}
        cut = sum(starts[s] for s, r in holders(layout).items() if len(r) > 1)
        least = fewest_cut(lengths, ranks, -(-sum(lengths) // ranks))
        assert cut >= least
        found, optimum, total = found + cut, optimum + least, total + sum(lengths)
    assert found - optimum < 0.01 * total


def test_one_long_document_is_a_zigzag():
    layout = plan_layout(packed([64]), ranks=4)
    rows = [[(f.index, f.length) for f in row] for row in layout.ranks]
    assert rows == [[(0, 8), (56, 8)], [(8, 8), (48, 8)], [(16, 8), (40, 8)], [(24, 16)]]
    assert layout == plan_layout(packed([64]), ranks=4, strategy="zigzag")
    assert layout.report() == (1.0, 1.0, 7 / 4)


def test_a_document_that_fits_is_not_cut_for_one_that_does_not():
    layout = plan_layout(packed([120, 80]), ranks=2)
    assert [len(ranks) for ranks in holders(layout).values()] == [2, 1]


def test_a_short_document_goes_in_few_pieces():
    """The last 30 tokens fit nowhere whole; two pieces do, and not one for each end of a rank."""
    layout = plan_layout(packed([500, 485, 485, 500, 30]), ranks=4)
    assert layout.report() == (0.015, pytest.approx(1.0, abs=0.03), 6 / 4)


def test_balance_on_a_long_document_and_many_short_ones():
    generator = random.Random(3)
    lengths = [generator.randint(20, 200) for _ in range(80)] + [9000]
    generator.shuffle(lengths)
    layouts = {s: plan_layout(packed(lengths), ranks=4, strategy=s) for s in STRATEGIES}
    reports = {s: layout.report() for s, layout in layouts.items()}
    assert layouts["balanced"].report(causal=False).imbalance < 1.02
    assert reports["balanced"].imbalance < 1.02
    assert reports["zigzag"].imbalance > 1.1 and reports["contiguous"].imbalance > 1.3
    assert 9000 / sum(lengths) <= reports["balanced"].cut < 9000 / sum(lengths) + 0.02


def test_a_cut_document_evens_what_whole_ones_cost():
    """Who has the short one, which costs little a token, takes more of the long one's end."""
    layout = plan_layout(packed([6000, 2192]), ranks=2)
    assert [[(f.index, f.length) for f in row] for row in layout.ranks] == [
        [(0, 443), (4539, 1461), (6000, 2192)],
        [(443, 4096)],
    ]
    assert layout.report().imbalance < 1.0005
    generator = random.Random(5)
    for trial in range(100):
        ranks = (2, 3, 4, 8)[trial % 4]
        lengths = generator.choices((300, 800, 1500, 3000, 5000, 6500, 8000), k=4 * ranks)
        layout = plan_layout(packed([*lengths, 2 * sum(lengths)]), ranks=ranks)
        assert layout.report().imbalance < 1.01


def test_a_long_document_that_fits_is_cut_where_it_would_keep_the_others_waiting():
    """16,384 tokens whole have 65 million pairs more than the mean of both ranks; 8,192, 16."""
    layout = plan_layout(packed([16384, *[512] * 32]), ranks=2)
    assert layout.report() == (0.5, 1.0, (32 + 7) / 2)
    layout = plan_layout(packed([8192, *[512] * 16]), ranks=2)
    assert layout.report() == (0.0, pytest.approx(2 * 4096.5 / (4096.5 + 256.5)), 17 / 2)
    generator = random.Random(6)
    for trial in range(20):
        ranks, tokens = ((2, 32768), (4, 65536), (8, 32768))[trial % 3]
        multiple = 1 + 63 * (trial % 2)
        lengths = [int(generator.lognormvariate(7, 1.3)) + 1 for _ in range(ranks * tokens // 2550)]
        layout = plan_layout(packed(lengths), ranks=ranks, multiple=multiple)
        areas = [sum(area(f) for f in row if not f.padding) for row in layout.ranks]
        assert max(areas) - sum(areas) / ranks < 2**25 + tokens


def test_area_counts_pairs():
    fragment = Fragment(5, 40, 3)
    assert area(fragment) == sum(position + 1 for position in range(3, 8))
    first, second = [Fragment(4, 0), Fragment(2, 4)], [Fragment(6, 6)]
    layout = TokenLayout((tuple(first), tuple(second)))
    assert layout.report() == (0.0, pytest.approx(21 / ((10 + 3 + 21) / 2)), 1.5)
    assert layout.report(causal=False) == (0.0, pytest.approx(36 / ((16 + 4 + 36) / 2)), 1.5)


def test_area_without_the_causal_mask_is_the_whole_document():
    lengths = [8, 4]
    cut = plan_layout(packed(lengths), ranks=2, strategy="contiguous")  # 6 of the 8 | 2 and all 4
    assert cut.report(causal=False).imbalance == pytest.approx(6 * 8 / ((64 + 16) / 2))


def test_more_ranks_than_tokens_and_nothing_but_padding():
    for strategy in STRATEGIES:
        layout = plan_layout(packed([2]), ranks=8, strategy=strategy)
        assert sum(not f.padding for row in layout.ranks for f in row) in (1, 2)
        layout = plan_layout([Fragment(9, 0, padding=True)], ranks=4, strategy=strategy)
        assert all(f.padding for row in layout.ranks for f in row)
        assert layout.report() == (0.0, 1.0, 0.0)


def test_ten_thousand_documents():
    """Planned before every step, so its cost must not grow with the square of the documents."""
    generator = random.Random(4)
    lengths = [int(generator.lognormvariate(5, 0.8)) + 1 for _ in range(10_000)]
    report = plan_layout(packed(lengths), ranks=8).report()
    assert report.cut < 1e-3 and report.imbalance < 1.01


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"ranks": 0}, "ranks is 0; allowed: 1 or more"),
        ({"ranks": 2, "multiple": 0}, "multiple is 0; allowed: 1 or more"),
        (
            {"ranks": 2, "strategy": "stripe"},
            "layout is stripe; allowed: balanced, zigzag, contiguous",
        ),
    ],
)
def test_bad_arguments(arguments, line):
    with pytest.raises(ValueError, match=line):
        plan_layout(packed([4]), **arguments)


def test_rows_must_be_equally_long():
    with pytest.raises(ValueError, match=r"equally many tokens, got \[3, 4\]"):
        TokenLayout(((Fragment(4, 0),), (Fragment(3, 4),)))


def test_plans_of_a_batch_are_found_without_a_look_at_every_fragment(monkeypatch):
    info = plan_layout(packed([40, 3, 9]), ranks=3).info(0)
    plan = chains(info.peers)
    monkeypatch.setattr(Fragment, "__hash__", None)
    assert chains(info.peers) is plan
