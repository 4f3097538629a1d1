"""suite=attention: packings, inputs that no layout changes, and rows from real ranks."""

import dataclasses
import json
import statistics
import tempfile
from typing import get_args

import pytest
import torch

from benchmarks import attention, worker
from benchmarks.attention import SCHEMES
from benchmarks.context import Step, error
from benchmarks.documents import HISTOGRAMS, document_lengths
from benchmarks.job import Job
from benchmarks.parts import Draw, Shared, build_part
from benchmarks.report import Row
from benchmarks.settings import Part, Scheme
from models.sequence import Fragment
from parallel.cost import links, planned, softmax_bytes, softmax_heads_bytes, states_bytes
from parallel.layout import plan_layout
from parallel.plans import merged
from parallel.shapes import RecurrenceShape, SoftmaxShape
from tests.benchmarks.conftest import JOB, finished, settings, tiny
from tests.launch import forked

LENGTH = 256
GQA = SoftmaxShape(heads=4, kv_heads=2, dim=16, v_dim=16)  # of the tiny model
KDA = RecurrenceShape(heads=2, key_dim=16, value_dim=16, decays=16, transition=256)


def test_documents_fill_the_row_and_lengthen_from_histogram_to_histogram() -> None:
    means = []
    for histogram in HISTOGRAMS:
        drawn = [document_lengths(histogram, 4096, seed=seed) for seed in range(20)]
        assert all(sum(lengths) == 4096 and min(lengths) > 0 for lengths in drawn)
        assert drawn[0] == document_lengths(histogram, 4096, seed=0) != drawn[1]
        means.append(statistics.mean(4096 / len(lengths) for lengths in drawn))
    assert means[0] < means[1] / 2 < means[2] / 4
    for bins in HISTOGRAMS.values():
        assert sum(b.weight for b in bins) == pytest.approx(1)


def test_ranks_draw_parts_of_the_same_inputs() -> None:
    everything = torch.arange(700)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    some = torch.cat([order[:100], torch.tensor([-1, -1])])
    whole = Draw(everything, seed=1, precision="fp64", device="cpu")
    part = Draw(some, seed=1, precision="fp32", device="cpu")
    for shape in ((3, 2), (5,), ()):
        expected, got = whole(*shape), part(*shape)
        assert got[:, :100].double().equal(expected[:, order[:100]])
        assert got.shape[1] == 102 and not got[:, 100:].any()
    assert whole.weight(3, 4).equal(part.weight(3, 4).double())
    assert not whole(2).equal(whole(2))
    other = Draw(everything, seed=2, precision="fp64", device="cpu")
    assert not other(3, 2).equal(Draw(everything, seed=1, precision="fp64", device="cpu")(3, 2))


def test_error_is_that_of_the_worst_tensor() -> None:
    whole = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    reference = {"tokens": [whole, whole], "weights": [whole]}
    index = torch.tensor([2, 0])
    exact = {"tokens": [whole[index].float()] * 2, "weights": [whole.float()]}
    assert error(exact, reference, index) == 0
    tokens = [exact["tokens"][0], exact["tokens"][1] + torch.tensor([0.0, 0.4])]
    assert error(exact | {"tokens": tokens}, reference, index) == pytest.approx(0.1)
    assert error(exact | {"weights": [whole + 2]}, reference, index) == pytest.approx(0.5)


def test_padding_has_no_gradient() -> None:
    x = torch.ones(1, 3, 2, requires_grad=True)
    step = Step(Shared(torch.nn.Module(), [x], [], lambda: 2 * x), x[0, :, 0] > 0, autocast=None)
    step.valid = torch.tensor([True, True, False])
    assert step() == 4
    assert x.grad is not None and x.grad[0, :, 0].tolist() == [4, 4, 0]


def suite_rows(monkeypatch: pytest.MonkeyPatch, *, torchrun: bool = False, **changed) -> list[Row]:
    """Of a run whose measurements on one rank are in this process, the others in their own, which
    are forked, if asked by torchrun."""
    monkeypatch.setattr("benchmarks.job._finished", finished)
    launch = Job.run

    def run(job: Job, timeout: float) -> Row:
        if job.ranks == 1:
            return worker.run(job)
        return launch(job, timeout) if torchrun else on_forked_ranks(job)

    monkeypatch.setattr(Job, "run", run)
    some = settings(suite="attention", lengths=[LENGTH], **changed)
    return list(attention.rows(some, {"tiny": tiny()}, job=JOB, matmul={}))


def on_forked_ranks(job: Job) -> Row:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(dataclasses.asdict(job), file)
        file.flush()
        main, *_ = forked(job.ranks, "tests.script", "benchmarks/worker.py", file.name)
    assert main.returncode == 0, main.stderr
    return json.loads(main.stdout.splitlines()[-1])


def test_every_part_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = list(get_args(Part))
    rows = suite_rows(
        monkeypatch,
        parts=parts,
        masks=["full", "causal"],
        schemes=[],
        histograms=["medium"],
        dtypes=["fp32", "bf16"],
    )
    assert [(row["mask"], row["part"], row["dtype"]) for row in rows] == [
        (mask, part, dtype)
        for mask in ("full", "causal", "full document", "causal document")
        for part in parts
        for dtype in (["fp32"] if left_out(mask, part) else ["fp32", "bf16"])
    ]
    for row in rows:
        if left_out(row["mask"], row["part"]):
            assert "causal by definition" in row["note"] and "seconds" not in row
            continue
        least, most = (0, 1e-4) if row["dtype"] == "fp32" else (1e-4, 0.2)
        assert least < row["error"] < most, row
        assert row["comm_bytes"] == 0 and row["imbalance"] == 1


def left_out(mask: str, part: str) -> bool:
    return mask.startswith("full") and part in ("kda", "hybrid")


def test_a_recurrence_under_a_full_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="kda under a full mask: a recurrence is causal"):
        build_part("kda", tiny(), None, None, "full")  # type: ignore[arg-type]


def test_every_scheme_is_measured_somewhere() -> None:
    assert {scheme for schemes in SCHEMES.values() for scheme in schemes} == {*get_args(Scheme)}
    assert SCHEMES.keys() == {*get_args(Part)}


def test_two_and_four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = suite_rows(monkeypatch, parts=["softmax", "kda"], schemes=["usp", "state_passing"])
    assert [(row.get("scheme"), row["ranks"]) for row in rows] == [
        ("single", 1),
        ("usp", 4),
        ("single", 1),
        ("state_passing", 2),
    ]
    for row in rows:
        assert row["error"] < 1e-4 and row["imbalance"] == 1
    *_, usp, _, passing = rows
    assert passing["comm_bytes"] == states_bytes(KDA, links(2), size=4).total
    heads = softmax_heads_bytes(GQA, tokens=LENGTH // 4, ranks=2, size=4)
    layout = plan_layout([Fragment(LENGTH, 0)], ranks=4, strategy="zigzag").ranks
    pairs = merged(layout[:2]), merged(layout[2:])
    half = dataclasses.replace(GQA, heads=2, kv_heads=1)
    rings = [softmax_bytes(half, planned("ring", pairs, rank), size=4).total for rank in range(2)]
    assert usp["comm_bytes"] == heads.total + max(rings)


def test_a_full_mask_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank sees the second, and does as much."""
    _, row = suite_rows(monkeypatch, masks=["full"], schemes=["gather"], layouts=["contiguous"])
    peers = plan_layout([Fragment(LENGTH, 0)], ranks=2, strategy="contiguous").ranks
    assert row["mask"] == "full" and row["error"] < 1e-4 and row["imbalance"] == 1
    assert (
        row["comm_bytes"]
        == softmax_bytes(GQA, planned("gather", peers, 0, causal=False), size=4).total
    )


def test_ratios_are_to_one_rank() -> None:
    single = {"seconds": 3.0, "growth_gib": 2.0}
    row = {"seconds": 2.0, "growth_gib": 1.0, "comm_bytes": 2**21}
    attention._compare(row, single)
    assert (row["speed_ratio"], row["memory_ratio"], row["comm_mib"]) == (1.5, 0.5, 2.0)


def test_a_rank_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.attention.SCHEMES", {"softmax": ("state_passings",)})
    rows = suite_rows(monkeypatch, torchrun=True, timeout=200, schemes=["state_passings"])
    assert rows[-1]["note"] == "failed: KeyError: 'state_passings'"
