"""What a resumed run may change, and what not."""

import pytest

from tests.models.build import compose
from trainer.errors import ConfigError
from trainer.resume import check_resumable

SAVED: list[str] = []


@pytest.mark.parametrize(
    "change",
    [
        "trainer.steps=5",
        "trainer.micro_batch_size=2",
        "optim.lr=1",
        "checkpoint.every=1",
        "schedule=cosine",
        "mixer.gqa.num_heads=16",  # not in the pattern
        "model.name=other",
        "run_dir=elsewhere",
        "eval.every=3",
        "data.tokenizer=elsewhere",  # the stream compares its content,
        "data.seq_len=64",  # and the stages that have begun
    ],
)
def test_may_change(change):
    check_resumable(compose(SAVED), compose([change]))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("trainer.seed=1", "trainer.seed=1"),
        ("model.d_model=64", "model.d_model=64"),
        ("model.moe.top_k=1", "model.moe.top_k=1"),
        ("mixer.kda.num_heads=2", "mixer.kda.num_heads=2"),
        ("model.pattern=[kda,mla]", "model.pattern="),
        ("model=transformer", "model."),
    ],
)
def test_may_not_change(change, key):
    with pytest.raises(ConfigError) as caught:
        check_resumable(compose(SAVED), compose([change]))
    assert str(caught.value).startswith(key)
    assert "the checkpoint was written with" in str(caught.value)


def test_keys_that_a_checkpoint_is_too_old_for_have_their_defaults():
    old = compose(SAVED)
    del old["model"]["residual_block"], old["mixer"]["kda"]["full_rank_gate"]
    check_resumable(old, compose([]))
    for change in ("model.residual_block=2", "mixer.kda.full_rank_gate=true"):
        with pytest.raises(ConfigError, match=f"^{change.partition('=')[0]}="):
            check_resumable(old, compose([change]))
