"""What a run reads does not depend on its ranks, on who shares a row, on the processes that load,
on micro-batches or on where it was stopped: a chain of resumes against one uninterrupted run."""

import json

import pytest

from tests.launch import fork
from tests.models.build import compose
from tests.trainer.reading_on_ranks import run
from tests.trainer.tiny import overrides

COMMON = [
    "data=mixture",
    "data.path=null",
    "model.num_layers=2",
    "model.pattern=[kda,mla]",
    "model.moe=null",
    "mixer.mla.rope_base=10000",
    "trainer.precision=fp64",
    "schedule.total_steps=13",
    "checkpoint.keep=0",
    # Two steps of 8 rows, four of 4 twice as long, and again of 8: all change in the middle.
    "data.stages=[{tokens:384,seq_len:24,batch_size:8,weights:{long:1}},"
    "{tokens:1024,seq_len:64,batch_size:4,rope:{base:500,factor:2}},{seq_len:24,batch_size:8}]",
]
WORKERS = "data.workers=1"
# (ranks of the launch, [last step, overrides]): each goes on where the one before it stopped.
CHAIN = [
    (4, [(1, []), (3, ["parallel=ring", "parallel.cp=2"]), (4, ["data.balance=true"])]),
    (
        2,
        [
            (5, ["data.workers=2"]),
            (6, ["parallel=ulysses", "parallel.cp=2", "trainer.micro_batch_size=4"]),
            (7, ["trainer.micro_batch_size=2", WORKERS, "data.balance=true"]),
            (8, ["parallel=gather", "parallel.cp=2", WORKERS]),
        ],
    ),
    (1, [(9, ["data.workers=2"]), (10, []), (11, ["trainer.micro_batch_size=4"]), (13, [WORKERS])]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reading")
    sources = []
    for name, lengths in {
        "long": (150, 260, 90, 40, 33, 170),
        "short": (7, 20, 31, 12, 18),
    }.items():
        (folder / name).mkdir()
        for i, length in enumerate(lengths):
            text = "".join(chr(97 + (j * (i + 3) + length) % 26) for j in range(length))
            (folder / name / f"{i}.txt").write_text(text)
        sources.append(
            f"{name}:{{source:files,path:'{folder / name}',weight:{len(name)},eval_fraction:0.0}}"
        )
    made = [o for o in overrides(folder) if not o.startswith(("data=", "data.path", "run_dir"))]
    common = [*made, *COMMON, f"data.sources={{{','.join(sources)}}}"]

    def job(name, steps, *more):
        words = [*common, f"trainer.steps={steps}", f"run_dir={folder / name}", *more]
        return f"to{steps}", compose(words)

    run(*job("whole", 13))
    for ranks, links in CHAIN:
        jobs = [job("chain", steps, *more) for steps, more in links]
        if ranks == 1:
            for name, config in jobs:
                run(name, config)
        else:
            (folder / "jobs.json").write_text(json.dumps(jobs))
            fork(ranks, "tests.trainer.reading_on_ranks", str(folder / "jobs.json"), seconds=200)
    return folder


def reads(folder, name, steps, ranks):
    """step -> its rows in the order of the data ranks, alike on all ranks that share rows."""
    parts = [json.loads((folder / name / f"to{steps}_{r}.json").read_text()) for r in range(ranks)]
    by_place = {part["data_rank"]: part for part in parts}
    assert all(by_place[part["data_rank"]] == part for part in parts)
    places = [by_place[place] for place in range(len(by_place))]
    assert sum(len(rows) for part in places for rows in part["steps"]) > 0
    return {
        places[0]["first"] + i: [row for part in places for row in part["steps"][i]]
        for i in range(len(places[0]["steps"]))
    }


def test_every_step_reads_the_rows_of_the_uninterrupted_run(folder):
    whole, seen = reads(folder, "whole", 13, 1), {}
    for ranks, links in CHAIN:
        for steps, more in links:
            link = reads(folder, "chain", steps, ranks)
            assert max(link) == steps and not seen.keys() & link.keys()
            for step, rows in link.items():
                if "data.balance=true" in more:
                    assert sorted(rows) == sorted(whole[step]), step
                else:
                    assert rows == whole[step], step
            seen |= link
    assert seen.keys() == whole.keys() == set(range(1, 14))
    assert {len(rows) for rows in whole.values()} == {4, 8}
    assert {row.split()[0] for row in whole[1]} == {"long"}
    assert {row.split()[0] for row in whole[3]} == {"long", "short"}
    assert any("epoch 1" in row for rows in whole.values() for row in rows)


def test_every_step_has_the_loss_of_the_uninterrupted_run(folder):
    whole, chain = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "chain")
    )
    assert [r["step"] for r in chain] == [r["step"] for r in whole] == list(range(1, 14))
    for got, expected in zip(chain, whole, strict=True):
        assert (got["tokens"], got["epoch"]) == (expected["tokens"], expected["epoch"])
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-9, abs=0), got["step"]
        assert 0 <= got["data_wait"] <= 1
