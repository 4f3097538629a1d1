"""The options of a benchmark run, typed and checked: the keys of conf/benchmark.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from benchmarks.documents import Histogram
from parallel.layout import Strategy

Suite = Literal["train", "mixers", "attention", "checkpoint", "activations"]
Scheme = Literal["ring", "gather", "ulysses", "usp", "state_passing"]
Dtype = Literal["fp32", "bf16"]
Malloc = Literal["keep", "default"]
Part = Literal["softmax", "mla_keys", "mla", "kda", "hybrid"]
Mask = Literal["full", "causal"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    suite: Suite
    lengths: Sequence[int]  # tokens of the one row of a batch
    dtypes: Sequence[Dtype]
    repeats: int  # timed steps, behind a warm one
    peers: bool
    peer_max_tokens: int
    baselines: Sequence[str]
    mixers: Sequence[str]  # empty: all
    shares: Sequence[float]  # of the chunks; empty: nats_l as it is
    parts: Sequence[Part]
    masks: Sequence[Mask]
    schemes: Sequence[Scheme]
    layouts: Sequence[Strategy]
    histograms: Sequence[Histogram]
    ranks: int
    profile: bool
    malloc: Malloc
    threads: int | None
    device: Device
    seed: int
    timeout: float  # seconds a measurement may take
    patience: float  # seconds it may wait for a quiet machine
    output: str | None

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in pairwise(self.lengths))
        if not self.lengths or self.lengths[0] < 2 or not ascending:
            raise ValueError(
                f"lengths={list(self.lengths)}: allowed: ascending numbers of tokens, from 2 on"
            )
        if any(not 0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares={list(self.shares)}: allowed: numbers from 0 to 1")
        if not self.dtypes:
            raise ValueError("dtypes=[]: allowed: fp32, bf16 or both")
        for name in ("repeats", "ranks", "threads", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: allowed: above 0")
