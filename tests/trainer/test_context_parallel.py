"""Training with ranks that share sequences: the numbers of one rank.

test_mixers_on_ranks.py has every mixer under every scheme, test_engines.py more degrees with every
parameter's gradient.
"""

import json
import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist

from models.sequence import CausalConv, SequenceOp, SoftmaxAttention
from parallel.collectives import Axis, Traffic
from parallel.context import apply_context_parallel
from parallel.layout import plan_layout
from parallel.mesh import Mesh
from tests.launch import forked
from tests.models.build import compose, make_model
from tests.parallel.ranks import on_ranks
from tests.trainer.runs import Runs, assert_same
from trainer.agreement import check_agreement
from trainer.batch import IGNORE_INDEX, Batch, Run
from trainer.build import build_mesh, share_sequences
from trainer.construct import call
from trainer.errors import ConfigError
from trainer.loop import Trainer
from trainer.settings import Parallelism

HEADS = ["mixer.kda.num_heads=4", "mixer.mla.num_heads=4", "mixer.gqa.num_heads=4"]
RUN = [
    *HEADS,
    "model.pattern=[kda,mla]",  # with a dense feed-forward, then a mixture
    "model.num_layers=2",
    "data.seq_len=160",
    "trainer.steps=2",
    "trainer.micro_batch_size=2",
    "trainer.precision=fp64",
    "eval.every=2",
]
CHECKPOINTING = "trainer.activation_checkpointing=true"
SCHEMES = ("ring", "gather", "ulysses", "usp")
JOBS = {  # name -> ranks, overrides
    "ring": (2, ["parallel=ring", "parallel.layout=zigzag", CHECKPOINTING]),
    "gather": (2, ["parallel=gather", "parallel.layout=contiguous", "trainer.micro_batch_size=1"]),
    "usp": (4, ["parallel=usp", CHECKPOINTING]),
    "pairs": (4, ["parallel=ring", "parallel.cp=2", "parallel.layout=zigzag", CHECKPOINTING]),
    "mixed": (4, ["parallel=usp", "parallel.outer=gather", "parallel.recurrence=ulysses"]),
}
GQA = ["model.pattern=[gqa,kda]", "model.num_layers=2"]
# A gradient as it is, of weights that make scores, gates and routers decided.
ONE_STEP = ["trainer.steps=1", "trainer.grad_clip=null", "model.init_std=0.25"]
ROUTED = [  # chunks that each of four heads keeps or not
    "model.pattern=[nats_l,kda]",
    "model.num_layers=2",
    "mixer.nats_l.num_heads=4",
    "mixer.nats_l.head_dim=8",
    "mixer.nats_l.softmax_heads=8",
    "mixer.nats_l.chunk=8",
    *ONE_STEP,
]
ROUTED_JOBS = {  # the same, and what routers learn from
    "routed ring": (2, "parallel=ring", "mixer.nats_l.router_grad=selected"),
    "routed usp": (4, "parallel=usp", "mixer.nats_l.router_grad=counterfactual"),
}
FP32 = [*ONE_STEP, "trainer.precision=fp32"]
ROUNDED = {
    "fp32 gather": (2, [*FP32, "parallel=gather"]),
    "fp32 usp": (4, [*FP32, "parallel=usp"]),
}
NO_KEY = ["WANDB_API_KEY=", "WANDB_BASE_URL=http://127.0.0.1:9"]
OTHERS = {
    "disagreeing": (4, ["parallel=ring", "rank 2: parallel.layout=zigzag"]),
    "keyless": (2, ["parallel=ring", "logging.wandb=online", *NO_KEY]),
    "gqa": (2, [*GQA, "parallel=ring"]),
    "whole": (2, ["parallel=ring", "trainer.micro_batch_size=4"]),
    **{
        name: (ranks, [*ROUTED, *more, CHECKPOINTING])
        for name, (ranks, *more) in ROUTED_JOBS.items()
    },
}
SAVED = ("ring", "usp", "whole")  # to be read again, or for what the log says then


def axis(ranks: int) -> Axis:
    """As far as it goes without messages."""
    return Axis(cast(dist.ProcessGroup, None), 0, ranks, Traffic())


def mesh(ring: int, ulysses: int) -> Mesh:
    return Mesh(
        device=torch.device("cpu"),
        ranks=ring * ulysses,
        context=axis(ring * ulysses),
        ulysses=axis(ulysses),
        ring=axis(ring),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("context_parallel"), RUN)


@pytest.fixture(scope="module")
def alone(runs) -> list[dict]:
    runs.alone("alone", "trainer.micro_batch_size=4")
    return runs.records("alone")


@pytest.fixture(scope="module")
def said(runs) -> str:
    """By the ranks that train in all jobs; those behind `disagreeing` must go on."""
    every = OTHERS | JOBS | ROUNDED
    return "".join(
        runs.on_ranks(
            ranks,
            {
                name: words if name in SAVED else ["unsaved", *words]
                for name, (own, words) in every.items()
                if own == ranks
            },
        )
        for ranks in (2, 4)
    )


@pytest.mark.parametrize("name", JOBS)
def test_ranks_that_share_sequences_train_like_one(said, runs, alone, name):
    run = runs.records(name)
    assert_same(run, alone, 1e-9)
    assert all(record["comm_bytes"] > 0 for record in run)
    assert "routed_imbalance" not in run[0]
    assert "comm_bytes" not in alone[0]


@pytest.fixture(scope="module")
def rounding(runs) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient of one rank in fp64, and how far from it one rank is in fp32."""
    exact = runs.alone("exact", *ONE_STEP)["gradients"]
    return exact, distances(runs.alone("fp32", *FP32)["gradients"], exact)


def distances(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each parameter's gradient and, at "", of the whole; relative."""
    apart = {name: float((got[name] - x).norm()) for name, x in exact.items()}
    sizes = {name: float(x.norm()) for name, x in exact.items()}
    whole = math.hypot(*apart.values()) / math.hypot(*sizes.values())
    return {"": whole} | {name: apart[name] / sizes[name] for name in exact}


@pytest.mark.parametrize("name", ROUNDED)
def test_in_fp32_ranks_round_like_one(said, runs, rounding, name):
    """At most twice its distance from fp64. In the first gradient alone: from the second step on
    runs part, on one rank too, since AdamW divides by gradients that are all rounding, and a
    token whose two best experts are that close takes another one."""
    exact, alone = rounding
    for key, distance in distances(runs.seen(name, 0)["gradients"], exact).items():
        # A gradient of few numbers can be near by luck.
        assert distance <= 2 * max(alone[key], alone[""]), key


def test_attention_over_keys_and_values(said, runs):
    runs.alone("gqa alone", *GQA)
    assert_same(runs.records("gqa"), runs.records("gqa alone"), 1e-9)


@pytest.mark.parametrize("name", ROUTED_JOBS)
def test_routed_tokens(said, runs, name):
    *_, router_grad = ROUTED_JOBS[name]
    exact = runs.alone(f"{name} alone", *ROUTED, router_grad)["gradients"]
    assert_same(runs.records(name), runs.records(f"{name} alone"), 1e-9)
    assert all(record["routed_imbalance"] >= 1 for record in runs.records(name))
    apart = distances(runs.seen(name, 0)["gradients"], exact)
    assert max(apart.values()) < 1e-9, apart


def test_where_no_document_is_cut_nothing_is_sent(said, runs, alone):
    """Four rows on two ranks: each document fits one."""
    run = runs.records("whole")
    assert_same(run, alone, 1e-9)
    assert [record["comm_bytes"] for record in run] == [0, 0]
    assert " 0.0% of tokens in cut" in (runs.path / "whole" / "train.log").read_text()


def test_nothing_warns(said):
    assert "Warning" not in said


def test_the_log_tells_mesh_schemes_and_layout(said, runs):
    log = (runs.path / "usp" / "train.log").read_text()
    assert "mesh    4 x cpu = 1 data x 2 ring x 2 ulysses, gloo, fp64" in log
    assert "softmax=usp latent=usp recurrence=state_passing conv=halo, layout balanced" in log
    assert "2 micro-batches a rank" in log
    assert log.count("balanced layout: ") == 1 and "% of tokens in cut documents" in log


def test_what_one_rank_has_against_a_run_is_told_by_all(said):
    """The jobs behind these show that the ranks left them and joined again."""
    assert said.count("refused: parallel.layout=zigzag on rank 2, balanced on rank 0; ") == 4
    assert said.count("refused: logging.wandb=online: No API key configured") == 2


def test_ranks_that_plan_differently_are_told():
    on_ranks(4, check_different_plans)


def check_different_plans(axis: Axis) -> None:
    """Two data ranks of two context ranks each; those of the second disagree."""
    mesh = Mesh(
        device=torch.device("cpu"),
        rank=axis.rank,
        ranks=4,
        group=axis.group,
        context=Axis(axis.group, axis.rank % 2, 2, Traffic()),
    )
    signals = SimpleNamespace(noted="SIGTERM" if axis.rank == 2 else None)
    trainer = cast(Trainer, SimpleNamespace(mesh=mesh, step=6, signals=signals))
    batch = Batch.from_rows([[Run(torch.arange(5).numpy(), 9)]], seq_len=8, pad_id=77)
    assert Trainer._count(trainer, [batch, batch], 7) == (40, 40, 4 * 2 * 15, 1)
    with pytest.raises(ConfigError, match="step 7: the context ranks of data rank 1 planned diff"):
        Trainer._count(trainer, [batch], 7 + (axis.rank == 3))


def test_evaluation_refuses_ranks_with_other_data():
    on_ranks(2, check_other_data)


def check_other_data(axis: Axis) -> None:
    mesh = Mesh(device=torch.device("cpu"), rank=axis.rank, ranks=2, group=axis.group)
    config = {"trainer": {"seed": 1}, "data": {"path": f"node {axis.rank}"}}
    check_agreement(config, {"token store": "5b"}, mesh)
    with pytest.raises(ConfigError, match=r"^token store=1 on rank 1, 0 on rank 0; allowed: the s"):
        check_agreement(config, {"token store": axis.rank}, mesh)


def test_evaluation_on_the_command_line(said, runs, alone):
    """With another scheme and engine than the run's."""
    words = [f"checkpoint={runs.path / 'ring'}", "trainer.precision=fp64", "engine=fsdp2"]
    words += ["parallel=gather", "parallel.layout=zigzag"]
    main, other = forked(2, "tests.script", "scripts/evaluate.py", *words)
    assert (main.returncode, other.returncode, other.stdout) == (0, 0, ""), main.stderr
    figures = json.loads(main.stdout.splitlines()[-1])
    assert figures["loss"] == pytest.approx(alone[-1]["eval_loss"], rel=1e-9)


def test_a_shard_takes_labels_along():
    rows = [
        [Run(torch.arange(1, 8).numpy(), 9), Run(torch.arange(20, 22).numpy())],
        [Run(torch.arange(30, 35).numpy())],
    ]
    batch = Batch.from_rows(rows, seq_len=12, pad_id=77)
    layout = plan_layout(batch.documents(), ranks=3)
    parts = [batch.shard(layout, rank, pad_id=77) for rank in range(3)]
    seen = {}
    for rank, part in enumerate(parts):
        assert part.tokens.shape == part.labels.shape == part.info.shape == (1, 8)
        assert part.valid_labels == int((part.labels != IGNORE_INDEX).sum())
        assert set(part.tokens[~part.info.valid].tolist()) <= {77}
        assert set(part.labels[~part.info.valid].tolist()) <= {IGNORE_INDEX}
        index = layout.index(rank)
        for i, token, label in zip(
            index, part.tokens[0].tolist(), part.labels[0].tolist(), strict=True
        ):
            if i >= 0:
                seen[int(i)] = token, label
    tokens, labels = batch.tokens.flatten().tolist(), batch.labels.flatten().tolist()
    real = batch.info.valid.flatten().nonzero().flatten().tolist()
    assert seen == {i: (tokens[i], labels[i]) for i in real}
    assert sum(part.valid_labels for part in parts) == batch.valid_labels


@pytest.mark.parametrize("group", SCHEMES)
def test_names_of_parameters_stay(group):
    model = make_model([*HEADS, "model.pattern=[kda,mla,gqa]", "model.num_layers=3"])
    names = list(model.state_dict())
    section = call(Parallelism, compose([f"parallel={group}"])["parallel"], "parallel")
    share_sequences(model, section, mesh(2, 2))
    assert list(model.state_dict()) == names
    ops = [type(m).__module__ for m in model.modules() if isinstance(m, SequenceOp)]
    assert len([module for module in ops if module.startswith("parallel.")]) >= 4


def test_an_operation_without_a_scheme_is_named():
    model = make_model(["model.pattern=[kda]", "model.num_layers=1"])
    with pytest.raises(
        ValueError, match=r"layers\.0\.mixer\.recurrence is a ChunkedDeltaRule, which"
    ):
        apply_context_parallel(model, {CausalConv: lambda op: op, SoftmaxAttention: lambda op: op})


def test_routed_attention_without_blocks_is_refused():
    model = make_model([*ROUTED, "ops.routed_attention=reference"])
    section = call(Parallelism, compose(["parallel=ring"])["parallel"], "parallel")
    line = "parallel: DenseRoutedAttention has no blocks for RoutedRing; allowed: ops.routed_attent"
    with pytest.raises(ConfigError, match=line):
        share_sequences(model, section, mesh(2, 2))


def test_too_many_ranks_for_the_heads():
    model = make_model(["model.pattern=[kda,mla]", "model.num_layers=2", "mixer.mla.num_heads=3"])
    section = call(Parallelism, compose(["parallel=usp"])["parallel"], "parallel")
    share_sequences(model, section, mesh(2, 3))
    with pytest.raises(ConfigError, match=r"mixer.mla.num_heads=3: 4 ranks share the heads; "):
        share_sequences(make_model(["mixer.mla.num_heads=3"]), section, mesh(2, 4))
    two = ["model.pattern=[nats_l]", "model.num_layers=1", "mixer.nats_l.num_heads=2"]
    share_sequences(make_model([*two, "mixer.nats_l.softmax_heads=4"]), section, mesh(2, 4))
    with pytest.raises(ConfigError, match=r"mixer.nats_l.softmax_heads=2: 4 ranks share the heads"):
        share_sequences(make_model([*two, "mixer.nats_l.softmax_heads=2"]), section, mesh(2, 4))


@pytest.mark.parametrize(
    ("choices", "ranks", "line"),
    [
        (["parallel=ring", "parallel.cp=3"], 4, "parallel.cp is 3; allowed: a divisor of the run"),
        (["parallel=usp", "parallel.ulysses=3"], 4, "parallel.ulysses is 3; allowed: a divisor of"),
        (["parallel.cp=2"], 2, "parallel.cp is 2; parallel=single allows 1"),
        (["parallel=ring", "parallel.layout=stripe"], 2, "parallel.layout=stripe: allowed: bal"),
        (["parallel=ring", "parallel.softmax=tree"], 2, "parallel.softmax=tree: allowed: ring, "),
        (["parallel=ring", "parallel.timeout_minutes=0"], 2, "parallel.timeout_minutes is 0; allo"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, choices, ranks, line):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ConfigError) as error:
        build_mesh(compose(choices)["parallel"])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
