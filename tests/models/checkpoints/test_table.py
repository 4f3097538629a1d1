"""Key tables: slices and reshapes, there and back."""

import pytest
import torch

from models.checkpoints.table import Entry, Part, check_shapes, published_shapes, rows, same

EXPERTS = Entry(
    (2, 4, 3),
    tuple(
        Part(f"{e}.{name}", (2, 3), (e, half))
        for e in range(2)
        for name, half in (("gate", slice(0, 2)), ("up", slice(2, 4)))
    ),
)


@pytest.mark.parametrize(
    "entry",
    [
        same("a", (3,), published=(1, 1, 3, 1)),
        rows(["q", "k", "v"], (6, 4), published=(2, 1, 4)),
        EXPERTS,
    ],
)
def test_split_and_join_are_inverse(entry):
    ours = torch.randn(entry.shape)
    published = dict(entry.split(ours))
    shapes = {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert shapes == published_shapes({"x": entry})
    assert sum(tensor.numel() for tensor in published.values()) == ours.numel()
    assert torch.equal(entry.join(published.__getitem__), ours)


def test_rows_lie_in_the_order_given():
    joined = rows(["gate", "up"], (4, 1)).join(
        {"gate": torch.tensor([[1.0], [2.0]]), "up": torch.tensor([[3.0], [4.0]])}.__getitem__
    )
    assert joined.flatten().tolist() == [1, 2, 3, 4]


def test_parts_of_two_dtypes_are_refused():
    parts = {"q": torch.zeros(2, 3), "k": torch.zeros(2, 3, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"k is torch\.bfloat16 and q torch\.float32"):
        rows(["q", "k"], (4, 3)).join(parts.__getitem__)


def test_check_shapes_names_every_kind_of_fault_in_one_line():
    expected = {"a": (1,), "b": (2, 3), "c": (4,)}
    check_shapes(expected, dict(expected), fault="x")
    with pytest.raises(ValueError) as error:
        check_shapes(expected, {"a": (1,), "b": (3, 2), "d": (4,)}, fault="f is another model")
    assert str(error.value) == (
        "f is another model: 1 missing (c); 1 unexpected (d); 1 misshapen (b is [3, 2], not [2, 3])"
    )
    with pytest.raises(ValueError, match=r"5 missing \(0, 1, 2, \.\.\.\)$"):
        check_shapes({str(i): () for i in range(5)}, {}, fault="x")
