"""Figures as PNG files; matplotlib is imported where one is drawn, and needs no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def draw_line(
    path: Path,
    across: NDArray,
    up: NDArray,
    *,
    title: str,
    x: str,
    y: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Over a logarithmic axis of powers of two; limits: of the other axis."""
    figure, axes = _axes(6.4, 4.0)
    axes.plot(across, up, marker="o")
    if limits is not None:
        axes.set_ylim(*limits)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.set(title=title, xlabel=x, ylabel=y)
    _save(figure, path)


def draw_heat_map(
    path: Path,
    shares: NDArray,
    *,
    columns: Sequence[int],
    rows: Sequence[float],
    title: str,
) -> None:
    """shares [rows, columns] from 0 to 1, in colours and numbers; rows: depths, columns: tokens."""
    figure, axes = _axes(max(4.0, 1.6 + 0.8 * len(columns)), max(2.4, 1.4 + 0.45 * len(rows)))
    axes.imshow(shares, cmap="RdYlBu", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{length:,}" for length in columns])
    axes.set_yticks(range(len(rows)), [f"{depth:.0%}" for depth in rows])
    for (i, j), share in np.ndenumerate(shares):
        ink = "black" if 0.15 < share < 0.85 else "white"  # the ends of the colours are dark
        axes.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
    axes.set(title=title, xlabel="tokens", ylabel="depth")
    _save(figure, path)


def draw_routing(path: Path, layers: Mapping[int, NDArray]) -> None:
    """By layer, kept [heads, chunks] bool: a row of cells for every head, dark where it keeps."""
    widest = max(kept.shape[1] for kept in layers.values())
    rows = sum(len(kept) for kept in layers.values())
    figure, axes = _axes(min(16.0, 2.0 + 0.12 * widest), 1.2 + 0.18 * rows)
    cells = np.full((rows, widest), np.nan)
    names, row = [], 0
    for layer, kept in layers.items():
        repeats = -(-widest // kept.shape[1])  # where chunks are longer, a cell is wider
        for head, places in enumerate(kept):
            cells[row] = places.repeat(repeats)[:widest]
            names.append(f"{layer}.{head}: {places.mean():.0%}")
            row += 1
    axes.imshow(cells, cmap="Greys", vmin=0.0, vmax=1.4, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(rows), names, fontsize=7)
    axes.set(title="chunks kept for softmax attention", xlabel="chunk", ylabel="layer.head: share")
    _save(figure, path)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
