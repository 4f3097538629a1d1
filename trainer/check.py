"""What can be known of a run before its ranks exist: wrong values, sizes that do not divide.

What a queue would show after hours is told at once. Kernels and devices are those of other
machines, so nothing is asked of them here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import device

from models.ops.select import CHOICES, Ops
from parallel.collectives import Axis, Traffic
from parallel.mesh import Mesh, context_ranks
from trainer.auto_parallel import resolve_parallel
from trainer.build import build_learning_rate, build_model, share_sequences
from trainer.checkpoint.weights import open_weights
from trainer.construct import call, construct
from trainer.data import build_data, check_counts
from trainer.data.mixture import SOURCE_KEYS, build_corpus, section_path, source_sections
from trainer.data.opening import PLACE, locate
from trainer.data.stages import build_stages
from trainer.data.steps import Stage
from trainer.data.stream import check_shares
from trainer.data.tokenizer import build_tokenizer
from trainer.errors import ConfigError, naming
from trainer.evals.build import build_tasks
from trainer.settings import Evaluation, Parallelism, Saving, Settings, Start
from trainer.sinks import sections

Config = Mapping[str, Any]


def check_run(config: Config, *, nodes: int, node_ranks: int, files: bool) -> None:
    """Raises ConfigError for what would end train.py on nodes x node_ranks ranks at its start.

    config: the resolved train.yaml; files: whether the paths in it mean the same on this machine
    as on the nodes, and are to be looked at.
    """
    call(Start, {key: config[key] for key in ("run_dir", "resume", "init_from")}, "")
    settings: Settings = call(Settings, config["trainer"], "trainer")
    for section, kind in (("checkpoint", Saving), ("eval", Evaluation)):
        call(kind, config[section], section)
    sections(config, nodes * node_ranks)
    planned = not config["data"]["streaming"]
    build_tasks(config["eval"]["tasks"], config["tasks"], planned=planned)
    mesh, parallelism = _planned_mesh(config, nodes * node_ranks, node_ranks)
    stages, vocab_size = _check_data(config["data"], files)
    check_shares(stages, settings.micro_batch_size, mesh.data_ranks)
    model = build_model(config["model"], config["mixer"], vocab_size=vocab_size, ops=Ops())
    share_sequences(model, parallelism, mesh)
    construct(config["optim"], "optim", model=model)
    for section in ("engine", "objective"):
        construct({**config[section], "_partial_": True}, section)
    _check_ops(config["ops"])
    build_learning_rate(config)
    if not files:
        return
    for key, folder in (
        ("init_from", config["init_from"]),
        ("objective.teacher", config["objective"].get("teacher")),
    ):
        if folder is not None:
            with naming(key, folder):
                open_weights(Path(folder))


def _planned_mesh(config: Config, ranks: int, node_ranks: int) -> tuple[Mesh, Parallelism]:
    """The first rank's mesh, without groups to talk over."""
    launched = {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(node_ranks)}
    section, _ = resolve_parallel(config, launched)
    parallelism: Parallelism = call(Parallelism, section, "parallel")
    degrees = {"cp": parallelism.cp, "ulysses": parallelism.ulysses}
    cp = call(context_ranks, degrees, "parallel", ranks=ranks)
    sizes = {"context": cp, "ulysses": parallelism.ulysses, "ring": cp // parallelism.ulysses}
    axes: dict[str, Any] = {}
    if cp > 1:
        axes = {name: _axis(size) for name, size in sizes.items()}
    return Mesh(device=device("meta"), ranks=ranks, **axes), parallelism


def _check_ops(section: Config) -> None:
    for op, name in section.items():
        names = ["auto", *dict.fromkeys(choice.name for choice in CHOICES if choice.op == op)]
        if name not in names:
            raise ConfigError(f"ops.{op}={name}: unknown choice; allowed: {', '.join(names)}")


def _axis(ranks: int) -> Axis:
    return Axis(cast(dist.ProcessGroup, None), 0, ranks, Traffic())


def _check_data(section: Config, files: bool) -> tuple[list[Stage], int]:
    """-> stages, and the tokenizer's number of ids; of files that are not looked at, the smallest
    there is."""
    call(build_data, section, "data", partial=True)
    check_counts(**{key: section[key] for key in ("seed", "workers")})
    own = {key: section[key] for key in SOURCE_KEYS}
    sections, weights = source_sections(section["source"], section["sources"], own)
    sizes = {key: section[key] for key in ("seq_len", "batch_size")}
    stages = build_stages(section["stages"], **sizes, weights=weights)
    for name, keys in sections.items():
        unread = {"name": name, "tokenizer": None, "seed": 0, "cache_dir": None, "way": None}
        call(build_corpus, keys, section_path(name), partial=True, **unread)
        if files:
            locate(**{key: keys[key] for key in PLACE}, streaming=section["streaming"])
    if not files and section["tokenizer"] != "bytes":
        return stages, 1
    return stages, build_tokenizer(section["tokenizer"]).vocab_size
