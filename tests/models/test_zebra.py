"""The published sizes of Zebra-Llama, arXiv 2505.17272."""

from typing import cast

import pytest

from models.mixers.gqa import GroupedQueryAttention
from models.mixers.mamba2 import Mamba2
from models.mixers.mla import MultiHeadLatentAttention
from models.ops.select import Ops
from tests.models.build import make_model


@pytest.mark.parametrize(
    ("size", "heads", "head_dim", "share"),
    [("1b", 32, 64, 7.81), ("3b", 24, 128, 4.69), ("8b", 32, 128, 5.47)],
)
def test_the_cache_is_the_published_share_of_the_llama(size, heads, head_dim, share):
    """Of keys and values alone: the states of Mamba-2 do not grow."""
    model = make_model([f"model=zebra_llama_{size}"])
    d_model = model.embed.weight.shape[1]
    sizes = {"num_heads": heads, "num_kv_heads": 8, "head_dim": head_dim}
    llama = GroupedQueryAttention(d_model, ops=Ops(), **sizes).state_elements(1)
    mixers = [layer.mixer for layer in model.layers]
    kept = [mixer.state_elements(1) for mixer in mixers[::2]]
    assert {type(mixer) for mixer in mixers[::2]} == {MultiHeadLatentAttention}
    assert round(100 * sum(kept) / (llama * len(mixers)), 2) == share
    for mixer in mixers[1::2]:
        mamba = cast(Mamba2, mixer)
        # As wide as the attention that it replaces, each part of the projection from one of it.
        kv_width = 8 * head_dim
        assert mamba.out_proj.weight.shape == (d_model, heads * head_dim)
        assert mamba.widths == [kv_width, kv_width, heads * head_dim]
