"""A choice made once, and taken again."""

import torch

from models.ops.choices import Choices, choose

FIRST, SECOND, OTHER = torch.tensor([[1, 2], [3, 4], [5, 6]])


def test_later_passes_take_what_the_first_one_chose() -> None:
    choices = Choices()
    with choices.kept():
        assert choose(FIRST) is FIRST and choose(SECOND) is SECOND
    assert choose(OTHER) is OTHER
    for _ in range(2):
        with choices.kept():
            assert choose(OTHER) is FIRST
            with Choices().kept():  # another pass, begun meanwhile
                assert choose(OTHER) is OTHER
            assert choose(OTHER) is SECOND
    with choices.kept():
        assert choose(OTHER) is FIRST  # from the first on, also behind a pass that ended early
