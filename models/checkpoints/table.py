"""Key tables: where the numbers of a tensor of ours lie in the tensors of a published checkpoint.

Every published tensor is a slice of one of ours, reshaped, some with their rows in another order.
Nothing else happens on the way, so the same table reads and writes, and a round trip is exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A published tensor and its place in ours; `where` () is all of it.

    rows: in that place, the row at which each published one lies; None: in order.
    """

    name: str
    shape: Shape
    where: tuple[int | slice, ...] = ()
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """Our shape, and the published tensors that tile it."""

    shape: Shape
    parts: tuple[Part, ...]

    def join(self, get: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, from the published ones by name.

        Raises ValueError if their dtypes differ: one of them would be rounded.
        """
        first = get(self.parts[0].name)
        if len(self.parts) == 1 and self.parts[0].rows is None:
            return first.reshape(self.shape)
        whole = first.new_empty(self.shape)
        for part in self.parts:
            piece = get(part.name)
            if piece.dtype != first.dtype:
                raise ValueError(
                    f"{part.name} is {piece.dtype} and {self.parts[0].name} {first.dtype}; "
                    "parts of one tensor must have one dtype"
                )
            target = whole[part.where]
            order = slice(None) if part.rows is None else list(part.rows)
            target[order] = piece.reshape(target.shape)
        return whole

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The published tensors by name: views of ours, but for those in another order."""
        for part in self.parts:
            piece = tensor[part.where]
            if part.rows is not None:
                piece = piece[list(part.rows)]
            yield part.name, piece.reshape(part.shape)


KeyTable = dict[str, Entry]  # by the name that the tensor has with us


def same(name: str, shape: Shape, *, published: Shape | None = None) -> Entry:
    """One published tensor, reshaped from `published` if that is given."""
    return Entry(shape, (Part(name, published or shape),))


def rows(names: Sequence[str], shape: Shape, *, published: Shape | None = None) -> Entry:
    """Published tensors of one shape, one below the other; `shape` is that of their stack."""
    height = shape[0] // len(names)
    return stack(dict.fromkeys(names, height), shape[1:], published=published)


def stack(heights: Mapping[str, int], width: Shape, *, published: Shape | None = None) -> Entry:
    """Published tensors, by name their rows, one below the other; width: () for vectors."""
    parts, end = [], 0
    for name, height in heights.items():
        end += height
        where = (slice(end - height, end),)
        parts.append(Part(name, published or (height, *width), where))
    return Entry((end, *width), tuple(parts))


def swiglu(ours: str, theirs: str, d_model: int, hidden: int) -> KeyTable:
    """The dense feed-forward of the Llama line."""
    return {
        f"{ours}.gate_up.weight": rows(
            [f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"], (2 * hidden, d_model)
        ),
        f"{ours}.down.weight": same(f"{theirs}.down_proj.weight", (d_model, hidden)),
    }


def published_shapes(table: KeyTable) -> dict[str, Shape]:
    """Name -> shape of every published tensor."""
    return {part.name: part.shape for entry in table.values() for part in entry.parts}


def check_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, fault: str) -> None:
    """Raises ValueError, `fault` and the first few names, unless names and shapes are the same."""
    misshapen = [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": misshapen,
    }
    listed = [
        f"{len(names)} {how} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for how, names in differences.items()
        if names
    ]
    if listed:
        raise ValueError(f"{fault}: {'; '.join(listed)}")
