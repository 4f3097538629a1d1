"""Every engine at every degree of context parallelism, accumulating or not, against one process:
`make test-matrix`, which prints how far apart they were.

test_engines.py, test_deepspeed.py and test_accelerate.py hold a part of it in every run of tests.
"""

import pytest

from tests.trainer.runs import Runs
from tests.trainer.test_accelerate import BACK_ENDS
from tests.trainer.test_deepspeed import STAGES

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1800)]

STEPS = 20
RUN = [
    "model.pattern=[kda,mla]",  # with a dense feed-forward, then a mixture
    "model.num_layers=2",
    "mixer.kda.num_heads=4",
    "mixer.mla.num_heads=4",
    "data.seq_len=48",
    "data.batch_size=16",
    "data.eval_fraction=0",
    "trainer.grad_clip=0.5",  # below all norms
    f"trainer.steps={STEPS}",
]
SHAPES = {  # of four ranks: a step is one micro-batch, or four accumulated
    "cp1": ["trainer.micro_batch_size=4"],
    "cp1 accumulated": ["trainer.micro_batch_size=1"],
    "cp2": ["parallel=ring", "parallel.cp=2", "trainer.micro_batch_size=8"],
    "cp2 accumulated": ["parallel=ulysses", "parallel.cp=2", "trainer.micro_batch_size=2"],
    "cp4": ["parallel=usp", "parallel.layout=zigzag", "trainer.micro_batch_size=16"],
    "cp4 accumulated": ["parallel=gather", "trainer.micro_batch_size=4"],
}
EXACT = "trainer.precision=fp64"
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp2": ["engine=fsdp2"],
    **{f"zero{stage}": words for stage, words in STAGES.items()},
    **{f"accelerate {name}": ["engine=accelerate", *words] for name, words in BACK_ENDS.items()},
    "ddp fp64": ["engine=ddp", EXACT],
    "fsdp2 fp64": ["engine=fsdp2", EXACT],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("matrix"), RUN)


@pytest.fixture(scope="module")
def alone(runs) -> dict[str, dict]:
    """What one process saw, by precision."""
    whole = "trainer.micro_batch_size=16"
    return {"fp32": runs.alone("fp32", whole), "fp64": runs.alone("fp64", whole, EXACT)}


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_norms_and_losses_are_those_of_one_process(runs, alone, engine):
    """Prints, of each run: the gradients of the first step, relative to their largest entries, its
    norm and its loss, and the losses of all steps."""
    jobs = {
        f"{engine} {shape}": ["unsaved", *ENGINES[engine], *words]
        for shape, words in SHAPES.items()
    }
    runs.on_ranks(4, jobs, seconds=1700)
    precision = "fp64" if EXACT in ENGINES[engine] else "fp32"
    expected, gradients = runs.records(precision), alone[precision]["gradients"]
    bounds = {"fp32": (1e-5, 1e-5, 1e-5, 1e-4), "fp64": (1e-9,) * 4}[precision]
    for name in jobs:
        records, seen = runs.records(name), runs.seen(name, 0)["gradients"]
        assert [r["step"] for r in records] == list(range(1, STEPS + 1))
        assert [r["tokens"] for r in records] == [r["tokens"] for r in expected]
        assert seen.keys() == gradients.keys()
        gradient = max(
            float((seen[key].double() - x.double()).abs().max() / x.abs().max())
            for key, x in gradients.items()
        )
        norms, losses = (apart(records, expected, key) for key in ("grad_norm", "loss"))
        found = (gradient, norms[0], losses[0], max(losses))
        print(name, *(f"{x:.1e}" for x in found))
        assert all(x <= bound for x, bound in zip(found, bounds, strict=True)), name
    assert all(record["grad_norm"] > 0.5 for record in expected)
    assert expected[-1]["loss"] < expected[0]["loss"] - 1


def apart(records: list[dict], expected: list[dict], key: str) -> list[float]:
    """By step."""
    return [abs(r[key] / e[key] - 1) for r, e in zip(records, expected, strict=True)]
