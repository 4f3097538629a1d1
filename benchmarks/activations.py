"""suite=activations: what layers keep between forward and backward, and how.

A line is forward and backward of a model on one row of text, from weights that some steps have
trained. "kept" is what the forward leaves behind for the backward, counted storage by storage;
"memory" and "time" are over the row that keeps all as it is. Errors are those of gradients against
that row, difference over norm: of the gradient as a whole, and of the median and the worst
parameter.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.job import Config, Job, JobFailed
from benchmarks.report import Column, Row
from benchmarks.saved import Case
from benchmarks.settings import Dtype, Settings
from trainer.settings import ActivationStorage

COLUMNS = (
    Column("dtype", "dtype"),
    Column("length", "tokens", ",d"),
    Column("checkpointing", "checkpointing"),
    Column("storage", "storage"),
    Column("offload", "offload"),
    Column("kib_per_token", "kept KiB/token", ".1f"),
    Column("memory_ratio", "memory", ".3f"),
    Column("growth_gib", "growth GiB", ".3f"),
    Column("seconds", "s", ".3f"),
    Column("time_ratio", "time", ".2f"),
    Column("error", "error", ".1e"),
    Column("median_error", "median", ".1e"),
    Column("largest_error", "worst", ".1e"),
    Column("worst", "of"),
    Column("other_cores", "other load", ".2f"),
    Column("note", "note"),
)
STORAGES: tuple[ActivationStorage, ...] = ("exact", "int8", "fp8")


def rows(
    settings: Settings, configs: Mapping[str, Config], *, job: Job, matmul: Mapping[Dtype, float]
) -> Iterator[Row]:
    """One row for each dtype, length, and way to keep activations; offload on CUDA alone.

    configs: the first is the model; matmul is not used.
    """
    config = next(iter(configs.values()))
    for dtype in settings.dtypes:
        for length in settings.lengths:
            one = dataclasses.replace(job, kind="saved", config=config, dtype=dtype, length=length)
            with tempfile.TemporaryDirectory() as folder:
                yield from _rows(settings, one, str(Path(folder, "reference.pt")))


def _rows(settings: Settings, job: Job, reference: str) -> Iterator[Row]:
    """The first keeps all as it is."""
    cases = [
        Case(storage=storage, checkpointing=checkpointing, offload=offload, reference=reference)
        for offload in ((False, True) if job.device == "cuda" else (False,))
        for checkpointing in (False, True)
        for storage in STORAGES
    ]
    failed = _measured(settings, job, dataclasses.replace(cases[0], storage=None)).get("note")
    if failed:
        yield _row(job, cases[0]) | {"note": f"reference {failed}"}
        return
    plain: Row = {}
    for case in cases:
        row = _row(job, case) | _measured(settings, job, case)
        plain = plain or row
        _compare(row, plain)
        yield row


def _row(job: Job, case: Case) -> Row:
    checkpointing, offload = ("yes" if x else "" for x in (case.checkpointing, case.offload))
    facts = {"storage": case.storage, "checkpointing": checkpointing, "offload": offload}
    words = (case.storage, checkpointing and "checkpointed", offload and "offloaded")
    name = " ".join(word for word in words if word)
    return {"name": name, "dtype": job.dtype, "length": job.length, **facts}


def _measured(settings: Settings, job: Job, case: Case) -> Row:
    try:
        return dataclasses.replace(job, case=dataclasses.asdict(case)).run(settings.timeout)
    except JobFailed as failure:
        return {"note": str(failure)}


def _compare(row: Row, plain: Row) -> None:
    if "seconds" not in row or "seconds" not in plain:
        return
    row["kib_per_token"] = row["kept_bytes"] / row["length"] / 2**10
    row["memory_ratio"] = row["kept_bytes"] / plain["kept_bytes"]
    row["time_ratio"] = row["seconds"] / plain["seconds"]
