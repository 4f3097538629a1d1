"""suite=mixers: forward and backward of every mixer of conf/mixer alone, by length."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from benchmarks.job import Config, Job, JobFailed
from benchmarks.report import Column, Row
from benchmarks.settings import Dtype, Settings
from benchmarks.subjects import first_mixer, make_model

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
    Column("other_cores", "other load", ".2f"),
    Column("note", "note"),
)


def rows(
    settings: Settings, configs: Mapping[str, Config], *, job: Job, matmul: Mapping[Dtype, float]
) -> Iterator[Row]:
    """One row for each mixer, dtype and length, at the width of the model under test.

    Exponents are against the length before: 1 is linear, 2 quadratic.
    """
    config = next(iter(configs.values()))
    for name in config["mixer"]:
        one_layer = config["model"] | {"pattern": [name], "num_layers": 1}
        alone = dict(config) | {"model": one_layer}
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
                earlier = row
                yield row


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
