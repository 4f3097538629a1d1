"""suite=checkpoint: what a save costs the training of the model under test, in either mode.

"stall" is the time in which training stands still for a save, "lost" that by which the steps until
its end took longer in all, the stall included; both also as multiples of a step and of the same
save in mode sync. "plain" is the time of the save over that of writing and syncing as many bytes.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from benchmarks.job import Config, Job, JobFailed
from benchmarks.report import Column, Row
from benchmarks.settings import Dtype, Settings

COLUMNS = (
    Column("name", "save"),
    Column("dtype", "dtype"),
    Column("length", "tokens", ",d"),
    Column("seconds", "step s", ".3f"),
    Column("stall_seconds", "stall s", ".3f"),
    Column("stall_steps", "in steps", ".2f"),
    Column("stall_ratio", "of sync", ".2f"),
    Column("lost_seconds", "lost s", ".3f"),
    Column("lost_ratio", "of sync", ".2f"),
    Column("save_seconds", "save s", ".3f"),
    Column("save_ratio", "of plain", ".2f"),
    Column("mib", "MiB", ",.1f"),
    Column("bytes_ratio", "of state", ".3f"),
    Column("other_cores", "other load", ".2f"),
    Column("note", "note"),
)


def rows(
    settings: Settings, configs: Mapping[str, Config], *, job: Job, matmul: Mapping[Dtype, float]
) -> Iterator[Row]:
    """Two rows for each dtype and length, a save in the foreground and one in the background.

    matmul is not used.
    """
    config = next(iter(configs.values()))
    for dtype in settings.dtypes:
        for length in settings.lengths:
            shared: Row = {"dtype": dtype, "length": length}
            measured = dataclasses.replace(
                job, kind="checkpoint", config=config, dtype=dtype, length=length
            )
            try:
                result = measured.run(settings.timeout)
            except JobFailed as failure:
                yield {"name": "both", **shared, "note": str(failure)}
                continue
            for mode in ("sync", "background"):
                own, sync = result[mode], result["sync"]
                yield (
                    {"name": mode, **shared}
                    | result
                    | own
                    | {
                        "stall_steps": own["stall_seconds"] / result["seconds"],
                        "stall_ratio": own["stall_seconds"] / sync["stall_seconds"],
                        "lost_ratio": own["lost_seconds"] / sync["lost_seconds"],
                        "save_ratio": own["save_seconds"] / result["plain_seconds"],
                        "mib": result["bytes"] / 2**20,
                        "bytes_ratio": result["bytes"] / result["state_bytes"],
                    }
                )
