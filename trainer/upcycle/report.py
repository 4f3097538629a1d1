"""What a conversion changed, as a table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS = "{:>5}  {:<8}  {:<22}  {:>9}  {:>9}"


def table(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines: relative errors of scores and of outputs behind each step, and of the new mixer."""
    yield COLUMNS.format("layer", "mixer", "behind", "scores", "outputs")
    for layer in layers:
        place = layer["layer"], layer["mixer"]
        for step in layer["steps"]:
            figures = _figure(step.get("scores")), _figure(step.get("outputs"))
            yield COLUMNS.format(*place, step["step"], *figures)
        yield COLUMNS.format(*place, "all", "", _figure(layer["outputs"]))
        if layer["dropped"]:
            yield COLUMNS.format(*place, f"dropped: {', '.join(layer['dropped'])}", "", "").rstrip()


def _figure(error: float | None) -> str:
    return "" if error is None else f"{error:.2e}"
