"""Before a long run: is every rank as fast as the others, and do all run the same?"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report, surroundings
from benchmarks.rates import Rate, compute_rates, link_rates, outliers
from benchmarks.report import Column, Row
from parallel.collectives import Axis, Traffic, gather_objects
from parallel.mesh import Mesh, join, membership, node_axis
from trainer.construct import call
from trainer.errors import TrainingError

COLUMNS = (
    Column("name", "what"),
    Column("scope", "of a"),
    Column("size", "bytes", ",d"),
    Column("microseconds", "us", ",.1f"),
    Column("rate", "rate", ",.3g"),
    Column("unit", "unit"),
    Column("slowest", "slowest", ",.3g"),
    Column("place", "where"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of conf/preflight.yaml."""

    sizes: Sequence[int]
    matmul_size: int | None
    memory_mib: int
    repeats: int
    tolerance: float
    strict: bool
    timeout_minutes: float
    output: str | None

    def __post_init__(self) -> None:
        for name in ("matmul_size", "memory_mib", "repeats", "timeout_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; allowed: above 0")
        if not self.sizes or min(self.sizes) < 4:
            raise ValueError(f"sizes is {list(self.sizes)}; allowed: numbers of bytes, from 4 on")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; allowed: between 0 and 1")


def preflight(config: dict[str, Any]) -> None:
    """Prints a table, what is wrong, and all of it as one JSON object, the last line.

    Raises ConfigError, and under `strict` TrainingError if something is wrong.
    """
    settings: Settings = call(Settings, config, "")
    mesh = join(timeout_minutes=settings.timeout_minutes)
    with membership(mesh):
        rates = gather_objects(measure(mesh, settings), mesh.group)
        facts = gather_objects(_facts(mesh), mesh.group)
    result = examine(rates, facts, settings.tolerance)
    if mesh.main:
        for line in _lines(result):
            print(line)
        if settings.output is not None:
            report.write(Path(settings.output), result)
        print(json.dumps(result))
    if settings.strict and result["problems"]:
        raise TrainingError("; ".join(result["problems"]))


def measure(mesh: Mesh, settings: Settings) -> list[Rate]:
    """Of this rank, in the same order on all."""
    matmul_size = settings.matmul_size or (8192 if mesh.device.type == "cuda" else 2048)
    shared = {"repeats": settings.repeats}
    rates = list(
        compute_rates(
            mesh.device, matmul_size=matmul_size, memory_mib=settings.memory_mib, **shared
        )
    )
    if mesh.group is None:
        return rates
    everyone = Axis(mesh.group, mesh.rank, mesh.ranks, Traffic())
    rates += link_rates(everyone, mesh.device, scope="all", sizes=settings.sizes, **shared)
    neighbours = node_axis(mesh)
    if neighbours is not None:
        rates += link_rates(neighbours, mesh.device, scope="node", sizes=settings.sizes, **shared)
    return rates


def examine(
    rates: Sequence[Sequence[Rate]], facts: Sequence[Mapping[str, Any]], tolerance: float
) -> dict[str, Any]:
    """rates, facts: by rank; -> what is printed."""
    places = [f"rank {rank} ({own['host']})" for rank, own in enumerate(facts)]
    rows, problems = [], []
    for same in zip(*rates, strict=True):
        row = _row(same, places)
        rows.append(row)
        if not same[0].individual:
            continue
        for rank in outliers([rate.values for rate in same], tolerance):
            own = statistics.median(same[rank].values)
            problems.append(
                f"{row['name']} of {places[rank]}: {own:.3g} {row['unit']}, "
                f"{1 - own / row['rate']:.0%} below the median {row['rate']:.3g}"
            )
    for kind in ("versions", "variables"):
        problems += surroundings.differences([own[kind] for own in facts], places)
    return {
        "ranks": len(facts),
        "hosts": [own["host"] for own in facts],
        "versions": facts[0]["versions"],
        "variables": facts[0]["variables"],
        "rates": rows,
        "problems": problems,
    }


def _row(same: Sequence[Rate], places: Sequence[str]) -> Row:
    """One measurement over all ranks."""
    medians = [statistics.median(rate.values) for rate in same]
    seconds = statistics.median(s for rate in same for s in rate.seconds)
    slowest = min(range(len(same)), key=medians.__getitem__)
    return {
        "name": same[0].name,
        "scope": same[0].scope,
        "size": same[0].size,
        "microseconds": seconds * 1e6,
        "rate": statistics.median(medians),
        "unit": f"{same[0].unit}/s",
        "slowest": medians[slowest],
        "place": places[slowest],
        "by_rank": medians,
    }


def _facts(mesh: Mesh) -> dict[str, Any]:
    return {
        "host": surroundings.host(),
        "versions": surroundings.versions(mesh.device),
        "variables": surroundings.variables(os.environ),
    }


def _lines(result: Mapping[str, Any]) -> list[str]:
    known = result["versions"] | result["variables"]
    wide = max(map(len, known))
    return [
        f"{result['ranks']} ranks on {', '.join(dict.fromkeys(result['hosts']))}",
        *(f"{key:{wide}}  {value}" for key, value in known.items()),
        "",
        report.table(result["rates"], COLUMNS),
        "",
        *(f"problem: {line}" for line in result["problems"]),
    ]
