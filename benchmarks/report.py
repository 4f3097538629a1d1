"""Results as an aligned table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Column(NamedTuple):
    key: str
    header: str
    format: str = "s"

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        return "" if value is None else format(value, self.format)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Columns that have a value in some row; text to the left, numbers to the right."""
    shown = [column for column in columns if any(column.cell(row) for row in rows)]
    cells = [[column.header for column in shown]]
    cells += [[column.cell(row) for column in shown] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [
        [
            cell.ljust(width) if column.format == "s" else cell.rjust(width)
            for cell, width, column in zip(line, widths, shown, strict=True)
        ]
        for line in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def write(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
