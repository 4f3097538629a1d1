"""suite=train: whole training steps, ours beside transformers with the same weights and batch, and
beside our own baselines of equal size.

A step is forward, backward and AdamW with the mean loss of a token, batch one, on random bytes.
FLOPs are those of the model, three times the forward, whoever does it. Growth is the peak of memory
above the model at rest: gradients, optimiser state, activations. KiB/token is growth against the
length before, so that the constant parts cancel. "ours/its" is our speed, or our peak, over that of
the row.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.job import Config, Job, JobFailed
from benchmarks.machine import free_memory_gib
from benchmarks.report import Column, Row
from benchmarks.settings import Dtype, Settings
from benchmarks.subjects import initialised_model, make_model
from models.checkpoints import longhaul
from models.checkpoints.families import family_for
from models.checkpoints.shards import write_shards
from trainer.checkpoint.convert import convert
from trainer.checkpoint.weights import open_weights

COLUMNS = (
    Column("name", "implementation"),
    Column("dtype", "dtype"),
    Column("length", "tokens", ",d"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("seconds", "s/step", ".3f"),
    Column("peak_gib", "peak GiB", ".2f"),
    Column("growth_gib", "growth GiB", ".2f"),
    Column("kib_per_token", "KiB/token", ".1f"),
    Column("gflops", "GFLOP/s", ",.0f"),
    Column("of_matmul", "of matmul", ".0%"),
    Column("speed_ratio", "ours/its speed", ".2f"),
    Column("memory_ratio", "ours/its memory", ".3f"),
    Column("loss_difference", "loss error", ".1e"),
    Column("other_cores", "other load", ".2f"),
    Column("note", "note"),
)
SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-3}  # relative; another seed's weights are off by more


@dataclass(frozen=True)
class Subject:
    """What a line of the comparison runs at every length and dtype."""

    name: str
    config: Config
    weights: Path | None = None  # a Hugging Face folder; None: initial values by the seed
    peer: bool = False
    missing: str | None = None  # why it cannot run at all


def rows(
    settings: Settings, configs: Mapping[str, Config], *, job: Job, matmul: Mapping[Dtype, float]
) -> Iterator[Row]:
    """One row for each subject, dtype and length, as soon as it is measured.

    configs: the model under test first, then the baselines; job: what all measurements share;
    matmul: FLOP/s by dtype.
    """
    with tempfile.TemporaryDirectory() as folder:
        subjects = _subjects(settings, configs, Path(folder, "hugging_face"))
        for dtype in settings.dtypes:
            earlier: dict[str, Row] = {}
            for length in settings.lengths:
                shared = dataclasses.replace(job, dtype=dtype, length=length)
                for subject in subjects:
                    row = _measure(subject, shared, settings, earlier.get(subject.name, {}))
                    _derive(row, subject.config, matmul[dtype], earlier.get(subject.name, {}))
                    earlier[subject.name] = row
                    if subject is not subjects[0]:
                        _compare(row, earlier[subjects[0].name], same_weights=subject.peer)
                    yield row


def _subjects(settings: Settings, configs: Mapping[str, Config], folder: Path) -> list[Subject]:
    (name, config), *baselines = configs.items()
    others = [Subject(*baseline) for baseline in baselines]
    if not settings.peers:
        return [Subject(name, config), *others]
    missing = _export(config, folder, seed=settings.seed)
    weights = folder if missing is None else None
    peer = Subject(f"transformers {name}", config, weights, peer=True, missing=missing)
    return [Subject(name, config, weights), peer, *others]


def _export(config: Config, target: Path, *, seed: int) -> str | None:
    """Initial weights as a Hugging Face folder; -> why not, where no published
    family can hold them."""
    native = target.with_name("native")
    native.mkdir()
    model = initialised_model(config, seed=seed, device="cpu")
    write_shards(native, model.state_dict().items(), max_bytes=5e9)
    sections = {name: config[name] for name in ("model", "mixer")}
    (native / "config.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    if family_for(open_weights(native).config) is longhaul:
        return "skipped: no published family can hold this model"
    convert(source=str(native), target=str(target), format="hf")
    return None


def _measure(subject: Subject, shared: Job, settings: Settings, earlier: Row) -> Row:
    """The row of one measurement, or one with a note why it has no numbers."""
    row: Row = {"name": subject.name, "dtype": shared.dtype, "length": shared.length}
    reason = subject.missing or _too_large(subject, shared, settings, earlier)
    if reason is not None:
        return row | {"note": reason}
    job = dataclasses.replace(
        shared,
        kind="transformers" if subject.peer else "train",
        config=subject.config,
        weights=None if subject.weights is None else str(subject.weights),
        profile=settings.profile and not subject.peer,
    )
    try:
        return row | job.run(settings.timeout)
    except JobFailed as failure:
        return row | {"note": str(failure)}


def _too_large(subject: Subject, shared: Job, settings: Settings, earlier: Row) -> str | None:
    """Why not to try: the setting, or what the length before it took, were it to grow in step."""
    if subject.peer and shared.length > settings.peer_max_tokens:
        return f"skipped: peer_max_tokens={settings.peer_max_tokens}"
    if "note" in earlier and "seconds" not in earlier:
        return "skipped: as the length before"
    if not earlier:
        return None
    needed = earlier["rest_gib"] + earlier["growth_gib"] * shared.length / earlier["length"]
    free = free_memory_gib(shared.device)
    return f"skipped: about {needed:.1f} GiB, {free:.1f} free" if needed > free else None


def _derive(row: Row, config: Config, matmul: float, earlier: Row) -> None:
    """Adds rates, and memory per token against the length before."""
    if "seconds" not in row:
        return
    tokens = row["length"]
    flops = 3 * tokens * make_model(config).flops_per_token((tokens + 1) / 2)
    row["tokens_per_second"] = tokens / row["seconds"]
    row["gflops"] = flops / row["seconds"] / 1e9
    row["of_matmul"] = flops / row["seconds"] / matmul
    if "growth_gib" in earlier:
        more = row["growth_gib"] - earlier["growth_gib"]
        row["kib_per_token"] = more * 2**20 / (tokens - earlier["length"])


def _compare(row: Row, ours: Row, *, same_weights: bool) -> None:
    """Adds how many times as fast we are, and the share of its memory that we take."""
    if "seconds" not in row or "seconds" not in ours:
        return
    row["speed_ratio"] = row["seconds"] / ours["seconds"]
    row["memory_ratio"] = ours["peak_gib"] / row["peak_gib"]
    if same_weights:
        row["loss_difference"] = abs(ours["loss"] - row["loss"]) / abs(row["loss"])
        if not row["loss_difference"] <= SAME_LOSS[row["dtype"]]:
            row["note"] = "losses differ: not the same weights or batch"
