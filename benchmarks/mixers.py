"""suite=mixers: forward and backward of mixers of conf/mixer alone, by length."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from benchmarks.job import Config, Job, JobFailed
from benchmarks.report import Column, Row
from benchmarks.settings import Dtype, Settings
from benchmarks.subjects import first_mixer, make_model
from trainer.errors import ConfigError

COLUMNS = (
    Column("name", "mixer"),
    Column("dtype", "dtype"),
    Column("length", "tokens", ",d"),
    Column("milliseconds", "ms", ",.1f"),
    Column("microseconds_per_token", "us/token", ",.1f"),
    Column("gflops", "GFLOP/s", ",.0f"),
    Column("of_matmul", "of matmul", ".0%"),
    Column("growth_gib", "growth GiB", ".3f"),
    Column("time_exponent", "time ~ tokens^", ".2f"),
    Column("memory_exponent", "memory ~ tokens^", ".2f"),
    Column("of_first_time", "time / first", ".2f"),
    Column("of_first_memory", "growth / first", ".2f"),
    Column("other_cores", "other load", ".2f"),
    Column("note", "note"),
)


def rows(
    settings: Settings, configs: Mapping[str, Config], *, job: Job, matmul: Mapping[Dtype, float]
) -> Iterator[Row]:
    """One row for each mixer, dtype and length, at the width of the model under test.

    Exponents are against the length before: 1 is linear, 2 quadratic. Time and growth are compared
    with those of the first mixer at the same dtype and length. Raises ConfigError.
    """
    first: dict[tuple[Dtype, int], Row] = {}
    for name, alone in _alone(settings, next(iter(configs.values()))):
        mixer = first_mixer(make_model(alone))
        for dtype in settings.dtypes:
            earlier: Row = {}
            for length in settings.lengths:
                row: Row = {"name": name, "dtype": dtype, "length": length}
                measured = dataclasses.replace(
                    job, kind="mixer", config=alone, dtype=dtype, length=length
                )
                try:
                    row |= measured.run(settings.timeout)
                except JobFailed as failure:
                    yield row | {"note": str(failure)}
                    break
                flops = 3 * length * mixer.flops_per_token((length + 1) / 2)
                _derive(row, flops, matmul[dtype], earlier)
                _compare(row, first.setdefault((dtype, length), row))
                earlier = row
                yield row


def _alone(settings: Settings, config: Config) -> Iterator[tuple[str, Config]]:
    """Label and sections of a model of one layer for each mixer to measure."""
    mixers = config["mixer"]
    for name in settings.mixers or mixers:
        if name not in mixers:
            raise ConfigError(f"mixers={name}: allowed: {', '.join(mixers)}")
        model = config["model"] | {"pattern": [name], "num_layers": 1}
        if name != "nats_l" or not settings.shares:
            yield name, dict(config) | {"model": model}
            continue
        for share in settings.shares:
            routed = mixers[name] | {"router": "strided", "static_share": share}
            label, sections = f"{name} {share:.0%}", mixers | {name: routed}
            yield label, dict(config) | {"model": model, "mixer": sections}


def _compare(row: Row, first: Row) -> None:
    row["of_first_time"] = row["seconds"] / first["seconds"]
    if first["growth_gib"] > 0:
        row["of_first_memory"] = row["growth_gib"] / first["growth_gib"]


def _derive(row: Row, flops: float, matmul: float, earlier: Row) -> None:
    row["milliseconds"] = row["seconds"] * 1e3
    row["microseconds_per_token"] = row["seconds"] * 1e6 / row["length"]
    row["gflops"] = flops / row["seconds"] / 1e9
    row["of_matmul"] = flops / row["seconds"] / matmul
    if earlier:
        row["time_exponent"] = _exponent(row, earlier, "seconds")
        row["memory_exponent"] = _exponent(row, earlier, "growth_gib")


def _exponent(row: Row, earlier: Row, key: str) -> float | None:
    """Of the power of the length that `key` grows with; None where it did not grow from 0."""
    if row[key] <= 0 or earlier[key] <= 0:
        return None
    return math.log(row[key] / earlier[key]) / math.log(row["length"] / earlier["length"])
