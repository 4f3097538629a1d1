"""Preflight: what is measured, who is named, and when it fails."""

import json
import os

import pytest
import torch

from benchmarks import preflight
from benchmarks.rates import Rate, outliers
from benchmarks.surroundings import differences, variables
from parallel.collectives import Axis
from parallel.mesh import Mesh
from tests.launch import forked
from tests.parallel.ranks import on_ranks
from trainer.errors import TrainingError

KINDS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift"]
SETTINGS = preflight.Settings(
    sizes=[64, 4096],
    matmul_size=64,
    memory_mib=1,
    repeats=3,
    tolerance=0.1,
    strict=False,
    timeout_minutes=1,
    output=None,
)


def test_two_ranks_print_a_table_and_one_json_object(tmp_path):
    options = ["matmul_size=64", "memory_mib=1", "sizes=[64,4096]", "repeats=2"]
    options.append(f"output={tmp_path / 'rates.json'}")
    main, other = forked(2, "tests.script", "scripts/preflight.py", *options)
    assert (main.returncode, other.returncode, other.stdout) == (0, 0, ""), main.stderr
    lines = main.stdout.splitlines()
    assert lines[0].startswith("2 ranks on ")
    result = json.loads(lines[-1])
    assert json.loads((tmp_path / "rates.json").read_text()) == result
    assert result["versions"]["torch"] == torch.__version__
    assert result["variables"]["OMP_NUM_THREADS"] == "1"
    rows = result["rates"]
    assert [row["name"] for row in rows] == ["matmul fp32", "matmul bf16", "memory", *KINDS * 2]
    assert [row["size"] for row in rows[3:]] == [64] * 5 + [4096] * 5
    assert all(row["rate"] > 0 and len(row["by_rank"]) == 2 for row in rows)


def check_nodes(axis: Axis) -> None:
    """Four ranks as two nodes of two."""
    os.environ["GROUP_RANK"] = str(axis.rank // 2)
    mesh = Mesh(device=torch.device("cpu"), rank=axis.rank, ranks=axis.ranks, group=axis.group)
    rates = preflight.measure(mesh, SETTINGS)
    assert [rate.name for rate in rates if rate.scope == "all"] == KINDS * 2
    assert [rate.name for rate in rates if rate.scope == "node"] == KINDS * 2
    assert [rate.name for rate in rates if rate.individual] == [
        *("matmul fp32", "matmul bf16", "memory"),
        *("shift", "shift"),
        *KINDS * 2,
    ]


def test_links_are_measured_inside_nodes_too():
    on_ranks(4, check_nodes)


def test_a_single_process_measures_itself():
    assert [
        rate.scope for rate in preflight.measure(Mesh(device=torch.device("cpu")), SETTINGS)
    ] == ["rank"] * 3


@pytest.mark.parametrize(
    ("values", "slow"),
    [
        ([[100, 101, 99]] * 4, []),
        ([[100, 101, 99]] * 3 + [[80, 81, 79]], [3]),
        ([[100, 101, 99]] * 3 + [[92, 93, 91]], []),  # within the tolerance
        ([[100, 130, 70]] * 3 + [[80, 81, 79]], []),  # within what one rank's values spread
        ([[100, 101, 99], [50, 51, 49]], [1]),
        ([[100, 101, 99]] * 3 + [[150, 151, 149]], []),  # fast is no fault
        ([[100, 101, 20]] * 4, []),  # one bad value of many
        ([[7.0, 7.1]], []),
    ],
)
def test_outliers_are_below_the_median_and_beyond_the_spread(values, slow):
    assert outliers(values, 0.1) == slow


def test_who_differs_is_named():
    facts = [{"torch": "2.13", "nccl": "2.27"}, {"torch": "2.12", "nccl": "2.27"}]
    facts += [{"torch": "2.13", "CUDA_VISIBLE_DEVICES": "3"}] * 2
    assert differences(facts, ["a", "b", "c", "d"]) == [
        "nccl is missing on c, d; elsewhere 2.27",
        "torch is 2.12 on b; elsewhere 2.13",
    ]


def test_only_harmless_variables_are_shown():
    environ = {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7", "WANDB_API_KEY": "s", "SLURM_JWT": "t"}
    assert variables(environ) == {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "7"}


def facts(rank: int) -> dict:
    return {"host": f"n{rank // 2}", "versions": {"torch": "2.13"}, "variables": {}}


def test_an_outlier_is_named_with_its_host():
    rates = [[Rate("memory", "rank", "GB", [v, v], [1.0, 1.0])] for v in (200, 200, 200, 100)]
    result = preflight.examine(rates, [facts(rank) for rank in range(4)], 0.1)
    assert result["problems"] == [
        "memory of rank 3 (n1): 100 GB/s, 50% below the median 200",
    ]
    assert result["rates"][0]["place"] == "rank 3 (n1)"


def test_what_all_wait_for_together_is_nobodys_fault():
    rates = [[Rate("all_reduce", "all", "GB", [v, v], [1.0, 1.0], 64, False)] for v in (9, 9, 1)]
    assert preflight.examine(rates, [facts(rank) for rank in range(3)], 0.1)["problems"] == []


@pytest.mark.parametrize("strict", [False, True])
def test_strict_fails_on_problems(monkeypatch, capsys, strict):
    monkeypatch.setattr(preflight, "outliers", lambda values, tolerance: [0])
    config = vars(SETTINGS) | {"strict": strict}
    if strict:
        with pytest.raises(TrainingError, match=r"matmul fp32 of rank 0 \(.*; memory of rank 0"):
            preflight.preflight(config)
    else:
        preflight.preflight(config)
    lines = capsys.readouterr().out.splitlines()
    assert len(json.loads(lines[-1])["problems"]) == 3
    assert sum(line.startswith("problem: ") for line in lines) == 3
