"""Multi-head latent attention as published checkpoints of DeepSeek's form have it."""

from models.checkpoints.config import Config
from models.checkpoints.table import Entry, KeyTable, Part, Shape

# Our keyword -> field of config.json.
MLA_FIELDS = {
    "num_heads": "num_attention_heads",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
    "q_rank": "q_lora_rank",
}


def mla_table(theirs: str, d_model: int, mla: Config, *, interleaved: bool) -> KeyTable:
    """mla: keywords of the mixer; interleaved: neighbouring channels make a rotary pair there, as
    in DeepSeek's own checkpoints, where they are half a rope apart here."""
    heads, rank, q_rank = mla["num_heads"], mla["kv_rank"], mla["q_rank"]
    nope, rope = mla["nope_dim"], mla["rope_dim"]
    q_width = heads * (nope + rope)
    key_rows = _neighbours(1, rank, rope) if interleaved else None
    query_rows = _neighbours(heads, nope, rope) if interleaved else None

    def linear(ours: str, name: str, shape: Shape, rows: Shape | None = None) -> KeyTable:
        part = Part(f"{theirs}.{name}.weight", shape, rows=rows)
        table = {f"mixer.{ours}.weight": Entry(shape, (part,))}
        if mla["bias"] and ours in ("q_down", "kv_down", "out_proj"):
            part = Part(f"{theirs}.{name}.bias", shape[:1], rows=rows)
            table[f"mixer.{ours}.bias"] = Entry(shape[:1], (part,))
        return table

    table = {
        **linear("kv_down", "kv_a_proj_with_mqa", (rank + rope, d_model), key_rows),
        **linear("kv_norm", "kv_a_layernorm", (rank,)),
        **linear("kv_up", "kv_b_proj", (heads * (nope + mla["v_dim"]), rank)),
        **linear("out_proj", "o_proj", (d_model, heads * mla["v_dim"])),
    }
    if q_rank is None:
        return table | linear("q_proj", "q_proj", (q_width, d_model), query_rows)
    return {
        **table,
        **linear("q_down", "q_a_proj", (q_rank, d_model)),
        **linear("q_norm", "q_a_layernorm", (q_rank,)),
        **linear("q_up", "q_b_proj", (q_width, q_rank), query_rows),
    }


def _neighbours(heads: int, nope: int, rope: int) -> Shape:
    """Where the published rows lie in ours: those of a pair, next to each other, half a rope apart
    behind the others of their head."""
    turning = [nope + i // 2 + i % 2 * (rope // 2) for i in range(rope)]
    one = [*range(nope), *turning]
    return tuple(head * len(one) + row for head in range(heads) for row in one)
