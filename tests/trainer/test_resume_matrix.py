"""Steps are the same anywhere, and a run goes on anywhere from where any other left it.

Each document is written with letters of its own, so that tokens tell which documents a step read.
"""

import random
from itertools import product

import pytest
import torch

from tests.trainer.runs import Runs, assert_same
from tests.trainer.shared_on_ranks import VOCABULARY

ZERO3 = ["engine=zero3", "engine.whole_below=200"]
TOPOLOGIES = {  # name -> ranks, overrides; a step is one micro-batch, or two
    "ddp 1": (1, ["trainer.micro_batch_size=4"]),
    "ddp 2": (2, ["trainer.micro_batch_size=1"]),
    "fsdp2 2": (2, ["engine=fsdp2", "trainer.micro_batch_size=2"]),
    "fsdp2 4": (4, ["engine=fsdp2"]),
    "zero1 2": (2, ["engine=zero1", "trainer.micro_batch_size=2"]),
    "zero3 2": (2, [*ZERO3, "trainer.micro_batch_size=2"]),
    "cp 2": (2, ["parallel=ring", "parallel.layout=zigzag", "trainer.micro_batch_size=2"]),
}
NATS_L = [  # learned routing at half the layers, its share held by a bias that moves
    "model=nats_l",
    "model.pattern=[nats_l,gdn]",
    "mixer.nats_l.softmax_target=0.4",
    "parallel=gather",
    "parallel.layout=zigzag",
    "trainer.micro_batch_size=2",
]
ROUTED = {  # the same, from themselves only
    "nats_l fsdp2 2": (2, [*NATS_L, "engine=fsdp2"]),
    "nats_l zero3 2": (2, [*NATS_L, *ZERO3]),
}
ALL = TOPOLOGIES | ROUTED
NAMES = [*TOPOLOGIES]
# Each goes on from another, some from themselves; the rest are for `make test-matrix`.
ITSELF = [(name, name) for name in ("ddp 1", "fsdp2 2", "zero3 2", "cp 2")]
PAIRS = [*ITSELF, *zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True)]
REST = [pair for pair in product(NAMES, NAMES) if pair not in PAIRS]
SAVED, STEPS, EPOCHS = 3, 5, 2  # whole ones; saved in the middle of the second
RUN = [
    "model.pattern=[kda,mla]",  # with a dense feed-forward, then a mixture
    "model.num_layers=2",
    "data.seq_len=32",
    "data.batch_size=4",
    "data.eval_fraction=0",
    f"trainer.steps={STEPS}",
    f"checkpoint.every={SAVED}",
    "checkpoint.keep=0",
]
RANKS = (1, 2, 4)
LETTERS = 8  # of a document


def documents() -> list[bytes]:
    """From a few tokens to several rows; an epoch is 8 rows."""
    chance = random.Random(0)
    lengths = (100, 31, 30, 5, 2, 50, 3, 26)
    return [
        bytes(chance.choices(range(LETTERS * i, LETTERS * (i + 1)), k=length))
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Runs:
    """All of them, uninterrupted."""
    path = tmp_path_factory.mktemp("matrix")
    (path / "own").mkdir()
    for i, text in enumerate(documents()):
        (path / "own" / str(i)).write_bytes(text)
    runs = Runs(path, [*RUN, f"data.path={path / 'own'}"])
    for ranks in RANKS:
        saving = {name: words for name, (own, words) in ALL.items() if own == ranks}
        do(runs, ranks, saving)
    return runs


@pytest.fixture(scope="module")
def resumed(whole) -> Runs:
    return resume(whole, [*PAIRS, *zip(ROUTED, ROUTED, strict=True)])


@pytest.fixture(scope="module")
def others_resumed(whole) -> Runs:
    return resume(whole, REST)


def resume(runs: Runs, pairs: list[tuple[str, str]]) -> Runs:
    """Each pair from the saved step on."""
    for ranks in RANKS:
        jobs = {
            f"{name} from {saved}": ["unsaved", *ALL[name][1], runs.resume(saved, SAVED)]
            for saved, name in pairs
            if ALL[name][0] == ranks
        }
        do(runs, ranks, jobs)
    return runs


def do(runs: Runs, ranks: int, jobs: dict[str, list[str]]) -> None:
    if ranks > 1:
        runs.on_ranks(ranks, jobs)
        return
    for name, words in jobs.items():
        runs.alone(name, *(word for word in words if word != "unsaved"))


def read(runs: Runs, topology: str, name: str) -> torch.Tensor:
    """[steps, tokens], how often each token was trained on in each step, on all ranks."""
    ranks, _ = ALL[topology]
    return sum(torch.stack(runs.seen(name, rank)["read"]) for rank in range(ranks))


@pytest.mark.parametrize("topology", NAMES[1:])
def test_steps_are_those_of_one_process(whole, topology):
    assert_same(whole.records(topology), whole.records("ddp 1"), 1e-4)
    assert read(whole, topology, topology).equal(read(whole, "ddp 1", "ddp 1"))


def test_an_epoch_reads_each_document_once(whole):
    texts = torch.tensor([*b"".join(documents()), *[256] * len(documents())])
    epochs = read(whole, "ddp 1", "ddp 1")[: 2 * EPOCHS].unflatten(0, (EPOCHS, -1)).sum(1)
    assert epochs.equal(texts.bincount(minlength=VOCABULARY).expand_as(epochs))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_next_steps_are_those_of_the_uninterrupted_run(resumed, before, after):
    """To the bit where nothing changes; the documents, those that come next, everywhere."""
    goes_on(resumed, before, after)


@pytest.mark.parametrize("topology", ROUTED)
def test_routed_layers_on_ranks_that_share_rows_go_on_to_the_bit(resumed, topology):
    """What each head keeps, too."""
    goes_on(resumed, topology, topology)
    steps = resumed.records(topology)[SAVED:]
    for again, step in zip(resumed.records(f"{topology} from {topology}"), steps, strict=True):
        shares = {key: x for key, x in step.items() if key.startswith("softmax_share")}
        assert len(shares) == 3 and shares.items() <= again.items()
        assert step["comm_bytes"] == again["comm_bytes"] > 0
    assert len({step["softmax_share"] for step in steps}) > 1


@pytest.mark.matrix
@pytest.mark.parametrize(("before", "after"), REST)
def test_the_next_steps_are_those_of_any_uninterrupted_run(others_resumed, before, after):
    goes_on(others_resumed, before, after)


def goes_on(runs: Runs, before: str, after: str) -> None:
    name = f"{after} from {before}"
    steps = runs.records(before)[SAVED:]
    assert len(steps) == STEPS - SAVED
    assert_same(runs.records(name), steps, 0 if before == after else 1e-5)
    assert read(runs, after, name).equal(read(runs, before, before)[SAVED:])
