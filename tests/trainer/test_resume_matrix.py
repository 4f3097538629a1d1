"""A run goes on anywhere: what one engine saved on some ranks, each engine takes up on any others.

Each document is written with letters of its own, so that tokens tell which documents a step read.
"""

import random

import pytest
import torch

from tests.trainer.runs import Runs, assert_same
from tests.trainer.shared_on_ranks import VOCABULARY

TOPOLOGIES = {  # name -> ranks, overrides; a step is one micro-batch, or two
    "ddp 1": (1, ["trainer.micro_batch_size=4"]),
    "ddp 2": (2, ["trainer.micro_batch_size=1"]),
    "fsdp2 2": (2, ["engine=fsdp2", "trainer.micro_batch_size=2"]),
    "fsdp2 4": (4, ["engine=fsdp2"]),
    "zero1 2": (2, ["engine=zero1", "trainer.micro_batch_size=2"]),
    "zero3 2": (2, ["engine=zero3", "engine.whole_below=200", "trainer.micro_batch_size=2"]),
    "cp 2": (2, ["parallel=ring", "parallel.layout=zigzag", "trainer.micro_batch_size=4"]),
}
PAIRS = [(saved, resumed) for saved in TOPOLOGIES for resumed in TOPOLOGIES]
SAVED, STEPS, ROWS, EPOCHS = 4, 14, 4, 2  # the second epoch begins behind step 7
RUN = [
    "model.pattern=[kda,mla]",  # with a dense feed-forward, then a mixture
    "model.num_layers=2",
    "data.seq_len=32",
    f"data.batch_size={ROWS}",
    "data.eval_fraction=0",
    f"trainer.steps={STEPS}",
    f"checkpoint.every={SAVED}",
    "checkpoint.keep=0",
]
LETTERS = 8  # of a document


def documents() -> list[bytes]:
    """From a few tokens to several rows; an epoch is 28 rows."""
    chance = random.Random(0)
    lengths = [
        100,
        64,
        31,
        30,
        90,
        5,
        17,
        12,
        40,
        26,
        29,
        2,
        11,
        77,
        31,
        23,
        50,
        8,
        3,
        33,
        70,
        21,
        62,
        30,
    ]
    return [
        bytes(chance.choices(range(LETTERS * i, LETTERS * (i + 1)), k=length))
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Every topology uninterrupted, and every pair from step 4 on."""
    path = tmp_path_factory.mktemp("matrix")
    (path / "own").mkdir()
    for i, text in enumerate(documents()):
        (path / "own" / str(i)).write_bytes(text)
    runs = Runs(path, [*RUN, f"data.path={path / 'own'}"])

    def do(ranks: int, jobs: dict[str, list[str]]) -> None:
        if ranks > 1:
            runs.on_ranks(ranks, jobs)
            return
        for name, overrides in jobs.items():
            runs.alone(name, *overrides)

    do(1, uninterrupted(1))
    do(4, uninterrupted(4))
    do(2, uninterrupted(2) | going_on(runs, 2))
    do(1, going_on(runs, 1))
    do(4, going_on(runs, 4))
    return runs


def uninterrupted(ranks: int) -> dict[str, list[str]]:
    return {name: overrides for name, (own, overrides) in TOPOLOGIES.items() if own == ranks}


def going_on(runs: Runs, ranks: int) -> dict[str, list[str]]:
    return {
        f"{name} from {saved}": [*overrides, "checkpoint.every=0", runs.resume(saved, SAVED)]
        for name, overrides in uninterrupted(ranks).items()
        for saved in TOPOLOGIES
    }


def read(runs: Runs, topology: str, name: str) -> torch.Tensor:
    """[steps, tokens], how often each token was trained on in each step, on all ranks."""
    ranks, _ = TOPOLOGIES[topology]
    return sum(torch.stack(runs.seen(name, rank)["read"]) for rank in range(ranks))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_an_epoch_reads_each_document_once(runs, topology):
    texts = torch.tensor([*b"".join(documents()), *[256] * len(documents())])
    assert (
        read(runs, topology, topology).sum(0).equal(EPOCHS * texts.bincount(minlength=VOCABULARY))
    )


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_the_next_ten_steps_are_those_of_the_uninterrupted_run(runs, saved, resumed):
    """To the bit where nothing changes; the documents, those that come next, everywhere."""
    name = f"{resumed} from {saved}"
    whole = runs.records(saved)[SAVED:]
    assert len(whole) == 10
    assert_same(runs.records(name), whole, 0 if saved == resumed else 1e-5)
    assert read(runs, resumed, name).equal(read(runs, saved, saved)[SAVED:])
