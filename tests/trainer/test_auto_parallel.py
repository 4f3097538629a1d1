"""parallel=auto: replaced before the mesh is made, from the command line's own model."""

import pytest

from tests.models.build import MIXERS, compose
from trainer.auto_parallel import CHOSEN, resolve_parallel
from trainer.errors import ConfigError


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    def set_ranks(world: int, node: int) -> None:
        for key, value in (("RANK", 0), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", node)):
            monkeypatch.setenv(key, str(value))

    return set_ranks


def test_every_key_is_chosen_and_explained(ranks) -> None:
    ranks(8, 4)
    config = compose(["model=kimi_linear", "model.pattern=[kda,gqa,mla]", "parallel=auto"])
    section, lines = resolve_parallel(config)
    assert {key: section[key] for key in CHOSEN} == {
        "ulysses": 2,  # of 2 key heads
        "softmax": "usp",
        "latent": "usp",
        "recurrence": "state_passing",
        "outer": "gather",
    }
    assert [line.partition(":")[0] for line in lines] == [
        "softmax=usp",
        "latent=usp",
        "recurrence=state_passing",
    ]
    assert resolve_parallel(config | {"parallel": section}) == (section, [])


def test_what_is_stated_stays(ranks) -> None:
    ranks(4, 4)
    stated = ["parallel.cp=2", "parallel.softmax=ring", "parallel.recurrence=ulysses"]
    config = compose(["model=transformer", "parallel=auto", *stated])
    section, lines = resolve_parallel(config)
    assert (section["softmax"], section["recurrence"], section["cp"]) == ("ring", "ulysses", 2)
    assert lines == []  # a transformer has no other operation


def test_tokens_and_precision_are_those_of_the_run(ranks) -> None:
    """2 key heads of 4 in fp32: 20,000 tokens hide a hop, in bf16 10,000."""
    ranks(2, 1)
    alone = ["model=transformer", "parallel=auto"]
    for overrides, outer in (
        (["data.seq_len=36000"], "gather"),
        (["data.seq_len=36000", "trainer.precision=bf16"], "ring"),
        (["data.seq_len=12000", "trainer.micro_batch_size=4"], "ring"),
    ):
        section, _ = resolve_parallel(compose([*alone, *overrides]))
        assert section["softmax"] == outer, overrides


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_shapes(ranks, mixer: str) -> None:
    ranks(2, 2)
    config = compose(["model=kimi_linear", f"model.pattern=[{mixer}]", "parallel=auto"])
    assert resolve_parallel(config)[1]


def test_one_rank_has_nothing_to_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    section, lines = resolve_parallel(compose(["parallel=auto"]))
    assert lines == [] and "auto" not in section.values()


def test_other_keys_are_checked_first() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.softmax=rings"):
        resolve_parallel(compose(["parallel=auto", "parallel.softmax=rings"]))
