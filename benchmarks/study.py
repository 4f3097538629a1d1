"""Models against each other, trained alike: python -m benchmarks.study recall [key=value ...].

A study is a file of benchmarks/studies: overrides of train.py that all runs share, those of each
variant, seeds, and the figures of the last evaluation that are told. Each run has a folder below
`runs` (default runs/studies/<study>), so a study that was stopped goes on where it was; `variants`
and `seeds` choose some of them, `output` is a file for the results.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.job import ROOT
from benchmarks.machine import facts
from benchmarks.report import Column, Row, table, write

STUDIES = ROOT / "benchmarks" / "studies"


@dataclass(frozen=True, kw_only=True)
class Study:
    """figures: from the header of a column to the key of metrics.jsonl."""

    base: Sequence[str]
    variants: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    figures: Mapping[str, str]

    @classmethod
    def read(cls, name: str) -> "Study":
        return cls(**yaml.safe_load((STUDIES / f"{name}.yaml").read_text()))


def run(overrides: Sequence[str], folder: Path) -> Row:
    """The last line of metrics.jsonl that has an evaluation; trains unless that is done."""
    status = folder / "status.json"
    if not status.exists() or json.loads(status.read_text())["outcome"] != "done":
        command = [sys.executable, "scripts/train.py", *overrides, f"run_dir={folder}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(key.startswith("eval_") for key in line)][-1]


def summary(label: str, runs: Sequence[Row], figures: Mapping[str, str]) -> Row:
    """Means over seeds, and the standard deviation of the first figure."""
    row: Row = {"variant": label, "seeds": len(runs)}
    for header, key in figures.items():
        values = [line[key] for line in runs]
        row[header] = mean(values)
        if len(values) > 1:
            row.setdefault("deviation", stdev(values))
    return row


def main(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    options: dict[str, Any] = {
        key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in rest)
    }
    study = Study.read(name)
    runs = Path(options.get("runs", ROOT / "runs" / "studies" / name)).absolute()
    rows, every = [], []
    for label in options.get("variants", list(study.variants)):
        found = []
        for seed in options.get("seeds", study.seeds):
            overrides = [*study.base, *study.variants[label], f"trainer.seed={seed}"]
            found.append(run(overrides, runs / f"{label}_{seed}"))
            every.append({"variant": label, "seed": seed, **found[-1]})
        rows.append(summary(label, found, study.figures))
        print(label, "done", file=sys.stderr)
    headers = [Column("variant", "variant"), Column("seeds", "seeds", "d")]
    print(
        table(
            rows,
            [
                *headers,
                *(Column(key, key, ".4f") for key in rows[0] if key in study.figures),
                Column("deviation", "deviation", ".4f"),
            ],
        )
    )
    if "output" in options:
        command = f"python -m benchmarks.study {' '.join(arguments)}"
        write(Path(options["output"]), {**facts("cpu", 1, command), "rows": rows, "runs": every})


if __name__ == "__main__":
    main(sys.argv[1:])
