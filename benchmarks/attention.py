"""suite=attention: what context parallelism costs, for the masks of the Long-Context Attention
Benchmark, arXiv 2510.17896, full and causal, of one document and of packed ones, and for operations
that it lacks.

A line is forward and backward of a part of a layer on all tokens, by one process with all threads
(single), or by ranks with an equal share of the threads. Times, memory and bytes are those of the
worst rank; a step ends when the last rank does. "speed" is that of single over the same tokens,
"memory" the growth of one rank over that of single. The error is against fp64 on one rank, over
output and all gradients. Imbalance is that of the softmax area under the mask, largest over mean of
the ranks.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from benchmarks.context import Case
from benchmarks.documents import document_lengths
from benchmarks.job import Config, Job, JobFailed
from benchmarks.parts import CAUSAL_ONLY
from benchmarks.report import Column, Row
from benchmarks.settings import Dtype, Part, Scheme, Settings

COLUMNS = (
    Column("mask", "mask"),
    Column("documents", "documents"),
    Column("part", "part"),
    Column("scheme", "scheme"),
    Column("layout", "layout"),
    Column("dtype", "dtype"),
    Column("length", "tokens", ",d"),
    Column("ranks", "ranks", "d"),
    Column("seconds", "s", ".3f"),
    Column("speed_ratio", "speed", ".2f"),
    Column("growth_gib", "growth GiB", ".3f"),
    Column("memory_ratio", "memory", ".2f"),
    Column("comm_mib", "MiB received", ",.2f"),
    Column("error", "error", ".1e"),
    Column("imbalance", "imbalance", ".3f"),
    Column("other_cores", "other load", ".2f"),
    Column("note", "note"),
)
SCHEMES: dict[Part, tuple[Scheme, ...]] = {
    "softmax": ("ring", "gather", "ulysses", "usp"),
    "mla_keys": ("ring", "gather", "ulysses", "usp"),
    "mla": ("ring", "gather", "ulysses", "usp"),
    "kda": ("state_passing", "ulysses"),
    "hybrid": ("ring", "gather", "ulysses", "usp"),
}


def rows(
    settings: Settings, configs: Mapping[str, Config], *, job: Job, matmul: Mapping[Dtype, float]
) -> Iterator[Row]:
    """One row for each packing, mask, part, scheme, layout, dtype and length.

    configs: the first gives the sizes of mixers; matmul is not used.
    """
    config = next(iter(configs.values()))
    for length in settings.lengths:
        base = dataclasses.replace(job, kind="attention", config=config, length=length)
        packings: dict[str, list[int]] = {"": [length]}
        for histogram in settings.histograms:
            packings[histogram] = document_lengths(histogram, length, seed=settings.seed)
        for (documents, lengths), mask, part in product(
            packings.items(), settings.masks, settings.parts
        ):
            name = f"{mask} document" if documents else mask
            facts = {"mask": name, "documents": documents, "part": part}
            if mask == "full" and part in CAUSAL_ONLY:
                yield _row(base, **facts) | {"note": f"not measured: {CAUSAL_ONLY[part]}"}
                continue
            with tempfile.TemporaryDirectory() as folder:
                reference = str(Path(folder, "fp64.pt"))
                case = Case(part=part, mask=mask, documents=lengths, reference=reference)
                yield from _case_rows(settings, base, case, facts)


def _case_rows(settings: Settings, job: Job, case: Case, facts: Row) -> Iterator[Row]:
    """Single first, then every scheme and layout."""
    failed = _measured(settings, dataclasses.replace(job, dtype="fp64"), case).get("note")
    if failed:
        yield _row(job, **facts) | {"note": f"reference {failed}"}
        return
    for dtype in settings.dtypes:
        typed = dataclasses.replace(job, dtype=dtype)
        single = _row(typed, **facts, scheme="single") | _measured(settings, typed, case)
        yield single
        for shared in _shared_cases(settings, case):
            ranks = settings.ranks * shared.ulysses
            threads = max(job.threads // ranks, 1)
            several = dataclasses.replace(typed, ranks=ranks, threads=threads)
            row = _row(several, **facts, scheme=shared.scheme, layout=shared.layout)
            row |= _measured(settings, several, shared)
            _compare(row, single)
            yield row


def _shared_cases(settings: Settings, case: Case) -> Iterator[Case]:
    """usp takes twice the ranks, in pairs."""
    for scheme in SCHEMES[case.part]:
        for layout in settings.layouts:
            if scheme in settings.schemes:
                ulysses = 2 if scheme == "usp" else 1
                yield dataclasses.replace(case, scheme=scheme, layout=layout, ulysses=ulysses)


def _row(job: Job, **facts: str | None) -> Row:
    name = " ".join(str(fact) for fact in facts.values() if fact)
    return {"name": name, "dtype": job.dtype, "length": job.length, "ranks": job.ranks, **facts}


def _measured(settings: Settings, job: Job, case: Case) -> Row:
    try:
        return dataclasses.replace(job, case=dataclasses.asdict(case)).run(settings.timeout)
    except JobFailed as failure:
        return {"note": str(failure)}


def _compare(row: Row, single: Row) -> None:
    if "seconds" not in row or "seconds" not in single:
        return
    row["comm_mib"] = row["comm_bytes"] / 2**20
    row["speed_ratio"] = single["seconds"] / row["seconds"]
    if single["growth_gib"] > 0:
        row["memory_ratio"] = row["growth_gib"] / single["growth_gib"]
