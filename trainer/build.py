"""From a resolved configuration to the objects of a run: the one place where parts meet.

Configurations are plain dicts here, as in a checkpoint's config.yaml; each section is the keywords
of one constructor, and what a constructor refuses is a ConfigError with the key's full path.
"""

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from models.ffn import SwiGLU
from models.hybrid import HybridLM
from models.mixer import Mixer
from models.moe import MoE
from models.ops.routed import RoutedAttention
from models.ops.select import Ops
from parallel.activation_checkpoint import apply_activation_checkpointing
from parallel.context import apply_context_parallel, build_schemes, heads_needed
from parallel.mesh import Mesh, host_group, join
from trainer.activations import store_activations
from trainer.agreement import check_agreement
from trainer.checkpoint.keep import Keep
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.weights import load_weights
from trainer.console import header
from trainer.construct import call, construct
from trainer.data import Data, DocumentStream, Stream, StreamedData, TrainStream, build_data
from trainer.data.balance import RowCost
from trainer.data.report import describe
from trainer.data.steps import Stage
from trainer.data.tokenizer import padded
from trainer.engine import Engine, LossModule, verify_gradient_factor
from trainer.errors import ConfigError, naming
from trainer.evals.build import build_suite
from trainer.evals.scoring import Scorer
from trainer.evals.task import Bench
from trainer.guard import Guard, Spike
from trainer.heap import keep_heap
from trainer.loader import Loader
from trainer.loop import Trainer
from trainer.metrics import peak_flops
from trainer.resume import check_resumable
from trainer.settings import Evaluation, Numerics, Parallelism, Saving, Settings, Setup
from trainer.sharder import Sharder
from trainer.sinks import build_sinks, check_sinks

log = logging.getLogger(__name__)

Config = Mapping[str, Any]


def build_model(
    model: Config,
    mixer: Config,
    *,
    vocab_size: int,
    ops: Ops,
    device: torch.device | str = "meta",
) -> HybridLM:
    """The model of the sections `model` and `mixer`, its parameters not yet initialised.

    vocab_size: the tokenizer's; a model that sets none has it padded. Raises ConfigError.
    """
    keywords = {k: v for k, v in model.items() if k not in ("name", "ffn", "moe", "vocab_size")}
    own = padded(vocab_size) if model.get("vocab_size") is None else model["vocab_size"]
    ffn, moe = model["ffn"], model.get("moe")
    if not isinstance(own, int) or own < vocab_size:
        raise ConfigError(f"model.vocab_size={own}: allowed: {vocab_size} (tokenizer) or more")
    mixers = {name: construct(mixer[name], f"mixer.{name}", ops=ops) for name in mixer}
    with torch.device(device):
        return call(
            HybridLM,
            keywords,
            "model",
            vocab_size=own,
            mixers=mixers,
            ffn=None if ffn is None else call(SwiGLU, ffn, "model.ffn", partial=True),
            moe=None if moe is None else call(MoE, moe, "model.moe", partial=True, ops=ops),
            ops=ops,
        )


def build_ops(section: Config, device: torch.device | str, dtype: torch.dtype | None = None) -> Ops:
    return call(Ops, section, "ops", device=device, dtype=dtype)


def materialise(
    model: HybridLM, unit: nn.Module, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Gives a unit of a model built on the meta device its memory and its initial values.

    These are drawn in fp32 whatever the dtype, so a run in fp64 starts from the same point.
    """
    unit.to_empty(device=device)
    model.reset_unit(unit)
    unit.to(dtype)


def parallelize(
    model: HybridLM, *, mesh: Mesh, parallelism: Parallelism, settings: Settings
) -> None:
    """Makes a model on the meta device ready for an engine, in place; the order matters.

    Compiled blocks are checkpointed: the compiler leaves a checkpointed block as it is where an
    operation in it is not for compiling.
    """
    share_sequences(model, parallelism, mesh)
    if settings.compile:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward)
    if settings.activation_checkpointing:
        apply_activation_checkpointing(model.layers)
    store_activations(model.layers, settings, mesh.device)


def share_sequences(model: HybridLM, parallelism: Parallelism, mesh: Mesh) -> None:
    """Puts the schemes of the configuration into the model, if ranks share sequences.

    Raises ConfigError for an operation without a scheme and for more ranks than heads.
    """
    if mesh.context is None or mesh.ulysses is None or mesh.ring is None:
        return
    keys = ("softmax", "latent", "recurrence", "scan_ranks", "outer")
    names = {key: getattr(parallelism, key) for key in keys}
    schemes = build_schemes(context=mesh.context, ulysses=mesh.ulysses, ring=mesh.ring, **names)
    try:
        apply_context_parallel(model, schemes)
    except ValueError as error:
        raise ConfigError(f"parallel: {error}") from error
    for name, mixer in zip(model.pattern, mixers_of(model), strict=True):
        for contract, needed in heads_needed(mixer).items():
            key = "softmax_heads" if contract is RoutedAttention else "num_heads"
            if (heads := getattr(mixer, key)) < needed:
                raise ConfigError(
                    f"mixer.{name}.{key}={heads}: {needed} ranks share the heads; "
                    f"allowed: {needed} heads or more, fewer ranks, or another scheme"
                )


def mixers_of(model: HybridLM) -> list[Mixer]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, Mixer)]


def build_mesh(section: Config) -> Mesh:
    """The processes of the run in the shape that the section `parallel` gives them."""
    parallelism: Parallelism = call(Parallelism, section, "parallel")
    keys = ("cp", "ulysses", "timeout_minutes")
    return call(join, {key: getattr(parallelism, key) for key in keys}, "parallel")


def build_sharder(
    models: Sequence[HybridLM], parallelism: Parallelism, mesh: Mesh, *, pad_id: int
) -> Sharder | None:
    """What cuts batches of all these models for the ranks that share sequences; None where none
    do."""
    if mesh.context is None:
        return None
    return Sharder(
        rank=mesh.context.rank,
        ranks=mesh.context.ranks,
        strategy=parallelism.layout,
        multiple=math.lcm(*(mixer.token_multiple for m in models for mixer in mixers_of(m))),
        pad_id=pad_id,
    )


def build_trainer(config: Config, *, mesh: Mesh, run_dir: Path) -> Trainer:
    """Everything of a run, up to the state of the checkpoint that it goes on from."""
    settings: Settings = call(Settings, config["trainer"], "trainer")
    saving: Saving = call(Saving, config["checkpoint"], "checkpoint")
    evaluation: Evaluation = call(Evaluation, config["eval"], "eval")
    parallelism: Parallelism = call(Parallelism, config["parallel"], "parallel")
    check_sinks(config, mesh, run_dir)
    kept = settings.keep_heap and keep_heap()
    numerics = Numerics.choose(settings.precision, mesh.device)
    share: dict[str, Any] = {
        "micro_batch_size": settings.micro_batch_size,
        "rank": mesh.data_rank,
        "ranks": mesh.data_ranks,
    }
    data = call(build_data, config["data"], "data")
    check_agreement(config, data.identity(), mesh)
    ops = build_ops(config["ops"], mesh.device, numerics.products)
    vocab_size = data.tokenizer.vocab_size
    model = build_model(config["model"], config["mixer"], vocab_size=vocab_size, ops=ops)
    blueprint = copy.deepcopy(model)  # an engine may keep parameters in another shape
    setup = Setup(
        settings=settings,
        numerics=numerics,
        parallelism=parallelism,
        mesh=mesh,
        ops=ops,
        tokenizer=data.tokenizer,
    )
    loss: LossModule = construct(config["objective"], "objective", model=model, setup=setup)
    engine = build_engine(loss, config, settings, numerics, parallelism, mesh)
    models = [model, *loss.beside]
    sharder = build_sharder(models, parallelism, mesh, pad_id=data.tokenizer.pad_id)
    check_lengths(data.stages, sharder)
    check_rope(data.stages, blueprint)
    stream = build_stream(data, blueprint, **share)
    bench = Bench(
        scorer=Scorer(engine.evaluate, mesh=mesh, sharder=sharder),
        mesh=mesh,
        data=data,
        micro_batch_size=settings.micro_batch_size,
        batches=evaluation.batches,
    )
    suite = build_suite(evaluation, config["tasks"], bench, run_dir / "eval")
    trainer = Trainer(
        blueprint=blueprint,
        engine=engine,
        mesh=mesh,
        loader=Loader(stream, sharder=sharder, workers=data.workers),
        store=build_store(saving, evaluation, suite.names(), mesh, run_dir),
        learning_rate=build_learning_rate(config),
        steps=settings.steps,
        grad_clip=math.inf if settings.grad_clip is None else settings.grad_clip,
        router_bias_rate=settings.router_bias_rate,
        save_every=saving.every,
        config=yaml.safe_dump(dict(config), sort_keys=False),
        suite=suite,
        eval_every=evaluation.every,
        peak_flops=peak_flops(mesh.device, numerics.precision),
        guard=build_guard(settings),
        bad_batches=run_dir / "bad_batches.jsonl",
    )
    facts: dict[str, Any] = {
        "mesh": mesh,
        "ops": ops,
        "numerics": numerics,
        "memory": engine.memory(),
    }
    for line in header(
        config, blueprint, data.stages, parallelism=parallelism, heap_kept=kept, **facts
    ):
        log.info(line)
    start_from(trainer, config)
    if mesh.main and isinstance(stream, TrainStream):
        for line in describe(stream, row_cost(blueprint), sharder):
            log.info(line)
    trainer.sinks = build_sinks(trainer, config, run_dir)
    return trainer


def row_cost(model: HybridLM) -> RowCost:
    """FLOPs are affine in the tokens that a token sees, for every mixer; that a window ends is not
    seen here."""
    token = model.flops_per_token(0)
    return RowCost(token=token, pair=model.flops_per_token(1) - token)


def build_stream(data: Data | StreamedData, model: HybridLM, **share: int) -> Stream:
    """The training rows of one data rank; share: micro_batch_size, rank and ranks."""
    if isinstance(data, StreamedData):
        return DocumentStream(data, **share)
    return TrainStream(data, cost=row_cost(model) if data.balance else None, **share)


def check_lengths(stages: Sequence[Stage], sharder: Sharder | None) -> None:
    """Raises ConfigError for rows that mixers cannot share among ranks without padding."""
    for seq_len in dict.fromkeys(stage.seq_len for stage in stages):
        if sharder is not None and seq_len % sharder.multiple:
            raise ConfigError(
                f"data.seq_len={seq_len}: with parallel.cp={sharder.ranks} it must be a multiple "
                f"of {sharder.multiple}, the block of a mixer"
            )


def check_rope(stages: Sequence[Stage], model: HybridLM) -> None:
    """Raises ConfigError for a stage with a rotary setting that the model cannot take."""
    for i, stage in enumerate(stages):
        try:
            model.set_rope(**dataclasses.asdict(stage.rope))
        except ValueError as error:
            raise ConfigError(f"data.stages[{i}].rope: {error}") from error
    model.set_rope()


def build_guard(settings: Settings) -> Guard:
    keys = ("nonfinite", "max_skips", "rollback_steps", "max_rollbacks")
    spike: Spike = call(Spike, settings.spike, "trainer.spike")
    return Guard(spike=spike, **{key: getattr(settings, key) for key in keys})


def build_engine(
    loss: LossModule,
    config: Config,
    settings: Settings,
    numerics: Numerics,
    parallelism: Parallelism,
    mesh: Mesh,
) -> Engine:
    """Wraps a loss, whose model is on the meta device; the engine gives it memory and values."""
    model = loss.model
    parallelize(model, mesh=mesh, parallelism=parallelism, settings=settings)
    make = functools.partial(construct, config["engine"], "engine", mesh=mesh, numerics=numerics)
    verify_gradient_factor(make, mesh)
    torch.manual_seed(settings.seed)
    engine: Engine = make(
        loss=loss,
        initialise=functools.partial(
            materialise, model, device=mesh.device, dtype=numerics.parameters
        ),
        optimizer=lambda model: construct(config["optim"], "optim", model=model),
    )
    if settings.compile and not engine.compiles:
        raise ConfigError(
            "trainer.compile=true: parameters that ranks fetch for their use cannot be compiled; "
            "allowed: false, or an engine other than zero3"
        )
    return engine


def build_store(
    saving: Saving, evaluation: Evaluation, figures: Sequence[str], mesh: Mesh, run_dir: Path
) -> CheckpointStore:
    """Where checkpoints go; figures: those an evaluation gives. Collective; raises ConfigError."""
    if saving.keep_best and (not evaluation.every or saving.every % evaluation.every):
        raise ConfigError(
            f"checkpoint.keep_best={saving.keep_best}: with eval.every={evaluation.every} and "
            f"checkpoint.every={saving.every} not every checkpoint has a loss; allowed: 0, or an "
            "eval.every that divides checkpoint.every"
        )
    if saving.keep_best and saving.best_metric not in figures:
        raise ConfigError(
            f"checkpoint.best_metric={saving.best_metric}: eval.tasks give no such figure; "
            f"allowed: {', '.join(figures)}"
        )
    return CheckpointStore(
        run_dir / "checkpoints",
        keep=Keep(
            newest=saving.keep,
            every=saving.keep_every,
            best=saving.keep_best,
            metric=saving.best_metric,
            highest=saving.best_direction == "max",
        ),
        group=host_group(mesh),
        background=saving.background,
    )


def build_learning_rate(config: Config) -> Callable[[int], float]:
    """From the step to the rate: optim.lr times the schedule."""
    schedule, peak = construct(config["schedule"], "schedule"), config["optim"]["lr"]
    schedule(1)  # refuses its values now rather than in the first step
    return lambda step: peak * schedule(step)


def start_from(trainer: Trainer, config: Config) -> None:
    """A checkpoint to resume, else weights to start from, else the initial values."""
    resume, init_from = config["resume"], config["init_from"]
    checkpoint = trainer.store.resolve(resume)
    if resume == "none" and trainer.store.resolve("auto") is not None:
        raise ConfigError(
            "resume=none: run_dir already holds checkpoints; allowed: another run_dir, or auto"
        )
    if checkpoint is not None:
        check_resumable(yaml.safe_load((checkpoint / "config.yaml").read_text()), config)
        trainer.load(checkpoint)
        log.info("resumed from %s", checkpoint)
    elif init_from is not None:
        with naming("init_from", init_from):
            load_weights(trainer.blueprint, Path(init_from), assign=trainer.engine.assign)
        log.info("weights from %s", init_from)
