"""How attention becomes latent attention."""

from dataclasses import dataclass
from typing import Literal

from models.convert.select_rope import Pairs

Size = int | Literal["full"]
Strategy = Literal["select", "rorope", "zebra"]


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """Sizes may be "full": nothing is lost.

    kv_rank: of the latent; q_rank: of compressed queries, null for none. rope_dim: rotary channels,
    for rope=select of each key head, else of all heads together. pairs: which rope=select keeps;
    freqfold: see `rorope`, null for as few as rope_dim needs. low_rank: by weights or by data.
    balance: keys are compressed as if they were so many times as large as values; null: as they
    are. latent_norm: latents are normalised, to the size that they have over the data.
    full_kv_heads: every query head has keys of its own, as DeepSeek's form wants it. Raises
    ValueError.
    """

    kv_rank: Size
    rope_dim: Size
    rope: Strategy
    low_rank: Literal["svd", "pca"]
    pairs: Pairs = "uniform"
    freqfold: int | None = None
    balance: float | None = None
    q_rank: Size | None = None
    latent_norm: bool = False
    full_kv_heads: bool = False

    def __post_init__(self) -> None:
        for name in ("kv_rank", "rope_dim", "q_rank"):
            size = getattr(self, name)
            if isinstance(size, int) and size < 1:
                raise ValueError(f"{name} is {size}; allowed: 1 or more, or full")
        if self.freqfold is not None and self.freqfold < 1:
            raise ValueError(f"freqfold is {self.freqfold}; allowed: 1 or more, or null")
        if self.balance is not None and self.balance <= 0:
            raise ValueError(f"balance is {self.balance}; allowed: above 0, or null")

    @property
    def reads_data(self) -> bool:
        by_norm = self.rope == "select" and self.pairs == "norm"
        return self.low_rank == "pca" or self.rope == "rorope" or self.latent_norm or by_norm
