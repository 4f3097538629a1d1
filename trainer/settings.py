"""The sections of the configuration that belong to no constructor, typed and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from models.ops.select import Ops
from parallel.block_scaled import Format
from parallel.context import AttentionScheme, RecurrenceScheme
from parallel.layout import Strategy
from parallel.mesh import Mesh
from trainer.data.tokenizer import Tokenizer
from trainer.guard import Action

Precision = Literal["fp32", "bf16", "fp64"]
ActivationStorage = Literal["exact", Format]


@dataclass(frozen=True)
class Numerics:
    """Of a run. bf16 is mixed: matrix products in bf16 over parameters and islands in fp32."""

    precision: Precision

    @classmethod
    def choose(cls, precision: Precision | None, device: torch.device) -> "Numerics":
        """Without a choice: bf16 on CUDA, fp32 elsewhere."""
        return cls(precision or ("bf16" if device.type == "cuda" else "fp32"))

    @property
    def parameters(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products, where it is not that of the parameters."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def products(self) -> torch.dtype:
        """The dtype of matrix products."""
        return self.autocast or self.parameters


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The section `trainer`."""

    steps: int
    micro_batch_size: int
    seed: int
    precision: Precision | None
    grad_clip: float | None
    router_bias_rate: float
    activation_checkpointing: bool
    activation_storage: ActivationStorage
    activation_offload: bool
    compile: bool
    loss_tile: int
    keep_heap: bool
    nonfinite: Action
    spike: Any  # the section of trainer.guard.Spike
    max_skips: int
    rollback_steps: int
    max_rollbacks: int
    lost_rank_seconds: float
    hang_minutes: float | None
    profile: Any  # the section of trainer.profiling.Profiling

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "loss_tile"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; allowed: above 0, or null")
        if self.router_bias_rate < 0:
            raise ValueError(f"router_bias_rate is {self.router_bias_rate}; allowed: 0 or more")
        for name in ("max_skips", "rollback_steps", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 or more")
        if self.lost_rank_seconds < 2:
            raise ValueError(f"lost_rank_seconds is {self.lost_rank_seconds}; allowed: 2 or more")
        if self.hang_minutes is not None and self.hang_minutes <= 0:
            raise ValueError(f"hang_minutes is {self.hang_minutes}; allowed: above 0, or null")
        if self.rounding and self.compile and not self.activation_checkpointing:
            raise ValueError(
                f"activation_storage is {self.rounding}; allowed: exact where compile=true decides "
                "what is kept, unless activation_checkpointing=true"
            )

    @property
    def hang_seconds(self) -> float | None:
        return None if self.hang_minutes is None else 60 * self.hang_minutes

    @property
    def rounding(self) -> Format | None:
        """Of what layers keep for the backward pass."""
        return None if self.activation_storage == "exact" else self.activation_storage


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the parts of a run are made for."""

    settings: Settings
    numerics: Numerics
    parallelism: "Parallelism"
    mesh: Mesh
    ops: Ops
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The section `checkpoint`."""

    every: int
    keep: int
    keep_every: int
    keep_best: int
    best_metric: str
    best_direction: Literal["min", "max"]
    background: bool

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 or more")


@dataclass(frozen=True, kw_only=True)
class Logging:
    """The section `logging`."""

    every: int
    tensorboard: bool
    wandb: Literal["off", "offline", "online"]
    project: str

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; allowed: 1 or more")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The section `eval`."""

    every: int
    tasks: Sequence[str]
    batches: int | None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every is {self.every}; allowed: 0 or more")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks is {self.tasks}; allowed: each once")
        if self.batches is not None and self.batches < 1:
            raise ValueError(f"batches is {self.batches}; allowed: 1 or more, or null")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The keys beside the sections: where a run is kept, and from where it goes on."""

    run_dir: str | None
    resume: str
    init_from: str | None


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """The section `parallel`: the ranks that share a sequence, and how each operation sees it.

    cp None: all ranks of the run. Without schemes, as in parallel=single, every rank holds whole
    rows.
    """

    cp: int | None
    timeout_minutes: float
    ulysses: int = 1
    layout: Strategy = "balanced"
    softmax: AttentionScheme | None = None
    latent: AttentionScheme | None = None
    recurrence: RecurrenceScheme | None = None
    conv: Literal["halo"] | None = None
    outer: Literal["ring", "gather"] = "ring"
    scan_ranks: int = 32

    def __post_init__(self) -> None:
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes is {self.timeout_minutes}; allowed: above 0")
        if self.scan_ranks < 2:
            raise ValueError(f"scan_ranks is {self.scan_ranks}; allowed: 2 or more")
        if None in self._schemes.values() and self.cp != 1:
            raise ValueError(
                f"cp is {self.cp}; parallel=single allows 1, other groups as many as divide the "
                "ranks of the run"
            )

    @property
    def _schemes(self) -> dict[str, str | None]:
        return {name: getattr(self, name) for name in ("softmax", "latent", "recurrence", "conv")}

    def describe(self) -> str:
        """One line for the log."""
        schemes = " ".join(f"{op}={name}" for op, name in self._schemes.items())
        return f"{schemes}, layout {self.layout}"
