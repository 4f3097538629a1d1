"""A run of a suite: measures, prints as it goes, ends with a table and, if asked for, a file."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import activations, attention, checkpoint, machine, mixers, report, train
from benchmarks.job import Config, Job, JobFailed
from benchmarks.report import Column, Row
from benchmarks.settings import Dtype, Settings
from trainer.build import build_ops
from trainer.construct import call
from trainer.errors import ConfigError, TrainingError
from trainer.main import preset

SECTIONS = ("model", "mixer", "optim", "ops")
SUITES: dict[str, ModuleType] = {
    "train": train,
    "mixers": mixers,
    "attention": attention,
    "checkpoint": checkpoint,
    "activations": activations,
}
PART_COLUMNS = (
    Column("part", "part"),
    Column("forward", "forward ms", ",.1f"),
    Column("backward", "backward ms", ",.1f"),
    Column("share", "share", ".1%"),
)


def benchmark(config: dict[str, Any]) -> None:
    """The keywords of the suite, and the model under test, are the keys of conf/benchmark.yaml."""
    options = {key: value for key, value in config.items() if key not in SECTIONS}
    settings: Settings = call(Settings, options, "")
    configs = {config["model"]["name"]: config}
    configs |= {name: preset("benchmark", name) for name in settings.baselines}
    sections = {name: {key: c[key] for key in SECTIONS} for name, c in configs.items()}
    run(settings, sections, command=shlex.join(["python", *sys.argv]))


def run(settings: Settings, configs: Mapping[str, Config], *, command: str) -> None:
    """configs: the model under test first, then the baselines, by name; sections of train.yaml.

    Tables go to standard output, a line per measurement to standard error. Raises ConfigError.
    """
    job = Job(
        kind="matmul",
        dtype="fp32",
        device=_device(settings),
        threads=settings.threads or machine.cores(),
        malloc=settings.malloc,
        seed=settings.seed,
        repeats=settings.repeats,
        patience=settings.patience,
    )
    ops = build_ops(next(iter(configs.values()))["ops"], job.device)
    head = machine.facts(job.device, job.threads, command) | {"ops": ops.describe()}
    matmul = _matmul_flops(job, settings)
    head["matmul"] = ", ".join(f"{d} {f / 1e9:,.0f} GFLOP/s" for d, f in matmul.items())
    suite = SUITES[settings.suite]
    rows: list[Row] = []
    result = head | {"settings": dataclasses.asdict(settings), "rows": rows}
    for row in suite.rows(settings, configs, job=job, matmul=matmul):
        rows.append(row)
        print(_progress(row), file=sys.stderr, flush=True)
        if settings.output is not None:
            report.write(Path(settings.output), result)
    _print(head, rows, suite.COLUMNS)


def _print(head: Mapping[str, Any], rows: list[Row], columns: tuple[Column, ...]) -> None:
    for key, value in head.items():
        print(f"{key:13} {value}")
    print("\n" + report.table(rows, columns))
    for row in rows:
        if "parts" in row:
            print(f"\n{row['name']}, {row['dtype']}, {row['length']:,} tokens: one profiled step")
            print(report.table(_part_rows(row["parts"]), PART_COLUMNS))


def _part_rows(parts: Mapping[str, Mapping[str, float]]) -> list[Row]:
    total = sum(sum(times.values()) for times in parts.values())
    return [
        {"part": part, "share": sum(times.values()) / total}
        | {way: seconds * 1e3 for way, seconds in times.items()}
        for part, times in parts.items()
    ]


def _device(settings: Settings) -> str:
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device=cuda: there is none; allowed here: auto, cpu")
    return ("cuda" if available else "cpu") if settings.device == "auto" else settings.device


def _matmul_flops(job: Job, settings: Settings) -> dict[Dtype, float]:
    """The best rate by dtype."""
    try:
        return {
            dtype: dataclasses.replace(job, dtype=dtype).run(settings.timeout)["flops"]
            for dtype in settings.dtypes
        }
    except JobFailed as failure:
        raise TrainingError(f"matrix products {failure}") from None


def _progress(row: Row) -> str:
    outcome = row.get("note") or f"{row['seconds']:.3f} s, {row['peak_gib']:.2f} GiB"
    return f"{row['name']} {row['dtype']} {row['length']:,}: {outcome}"
