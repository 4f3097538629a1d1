"""Training on a stream: the same rows on any ranks, and on from a checkpoint of others."""

from tests.trainer.runs import Runs, assert_same

COMMON = [
    "model.pattern=[kda,mla]",
    "model.num_layers=2",
    "data.streaming=true",
    "data.window=2",
    "data.batch_size=8",
    "data.eval_fraction=0.3",
    "trainer.precision=fp64",
    "checkpoint.every=3",
    "eval.every=3",
    "trainer.steps=6",
]


def test_ranks_and_resumes_do_not_change_what_is_read(tmp_path):
    runs = Runs(tmp_path, COMMON)
    runs.alone("alone")
    ring = ["parallel=ring", "parallel.layout=zigzag", "trainer.micro_batch_size=2"]
    jobs = {
        "shared": [*ring, runs.resume("alone", 3)],  # two ranks share sequences
        "others": ["trainer.micro_batch_size=2", runs.resume("alone", 3)],  # two data ranks
    }
    said = runs.on_ranks(2, jobs)
    expected = runs.records("alone")
    assert len({record["epoch"] for record in expected}) > 1
    for name in jobs:
        found = runs.records(name)
        assert len(found) == 3, said
        assert_same(found, expected[3:], 1e-7)
