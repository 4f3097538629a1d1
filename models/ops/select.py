"""Operations by name: `ops.softmax=flash` and the like, resolved once, never falling back."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from models.ops.conv import FragmentConv, ShiftedConv
from models.ops.decayed_sum import ChunkedDecayedSum, TokenLoopDecayedSum
from models.ops.delta_rule import ChunkedDeltaRule, TokenLoopDeltaRule
from models.ops.experts import GroupedExperts, GroupedMatmulExperts, LoopExperts
from models.ops.fla import FlaConv, FlaDecayedSum, FlaDeltaRule
from models.ops.flash import AtenVarlenSoftmax, FlashSoftmax
from models.ops.latent import MaterialisedLatent
from models.ops.routed import RoutedAttention, RoutedRecurrence
from models.ops.routed_delta import ChunkedRoutedDelta, TokenLoopRoutedDelta
from models.ops.routed_softmax import DenseRoutedAttention, TiledRoutedAttention
from models.ops.softmax import AtenSoftmax, EinsumSoftmax
from models.sequence import CausalConv, LatentAttention, LinearRecurrence, SoftmaxAttention

DISTRIBUTIONS = {"flash_attn": "flash-attn", "fla": "flash-linear-attention"}  # by import name
NARROW = (torch.bfloat16, torch.float16)
UP_TO_FP32 = (*NARROW, torch.float32)


class Choice(NamedTuple):
    op: str
    name: str
    build: Callable[..., Any]
    device: str | None = None  # None: any
    package: str | None = None  # import name
    dtypes: tuple[torch.dtype, ...] | None = None  # that it keeps the precision of; None: any

    def missing(self, device: str, dtype: torch.dtype | None) -> str | None:
        """What keeps this from running on `device`, in `dtype` unless that is None."""
        if self.device not in (None, device):
            return f"runs on {self.device} and the device is {device}"
        if dtype is not None and self.dtypes is not None and dtype not in self.dtypes:
            return f"does not compute in {dtype}"
        if self.package is not None and find_spec(self.package) is None:
            return f"needs the package {DISTRIBUTIONS[self.package]}, which is not installed"
        return None


# In order of preference: "auto" is the first that can run.
CHOICES = (
    Choice("softmax", "flash", FlashSoftmax, "cuda", "flash_attn", NARROW),
    Choice("softmax", "aten", AtenVarlenSoftmax, "cuda", dtypes=NARROW),
    Choice("softmax", "aten", AtenSoftmax, "cpu"),
    Choice("softmax", "reference", EinsumSoftmax),
    Choice("delta_rule", "fla", FlaDeltaRule, "cuda", "fla", NARROW),  # in fp32 it uses TF32
    Choice("delta_rule", "chunked", ChunkedDeltaRule),
    Choice("delta_rule", "reference", TokenLoopDeltaRule),
    Choice("decayed_sum", "fla", FlaDecayedSum, "cuda", "fla", NARROW),
    Choice("decayed_sum", "chunked", ChunkedDecayedSum),
    Choice("decayed_sum", "reference", TokenLoopDecayedSum),
    Choice("conv", "fla", FlaConv, "cuda", "fla", UP_TO_FP32),
    Choice("conv", "fused", FragmentConv),
    Choice("conv", "reference", ShiftedConv),
    Choice("experts", "grouped", GroupedMatmulExperts, "cuda", dtypes=UP_TO_FP32),
    Choice("experts", "grouped", GroupedExperts, "cpu"),
    Choice("experts", "reference", LoopExperts),
    Choice("routed_attention", "tiled", TiledRoutedAttention),
    Choice("routed_attention", "reference", DenseRoutedAttention),
    Choice("routed_delta_rule", "chunked", ChunkedRoutedDelta),
    Choice("routed_delta_rule", "reference", TokenLoopRoutedDelta),
)


class Ops:
    """Which implementation of each operation to use on a device.

    "auto" is the fastest that can run there, "reference" always the definition. Names are
    resolved here, once. dtype: of the run's matrix products; None excludes nothing. Raises
    ValueError for a name that does not exist or cannot run.
    """

    def __init__(
        self,
        *,
        softmax: str = "auto",
        delta_rule: str = "auto",
        decayed_sum: str = "auto",
        conv: str = "auto",
        experts: str = "auto",
        routed_attention: str = "auto",
        routed_delta_rule: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        device = torch.device(device).type
        asked = {
            "softmax": softmax,
            "delta_rule": delta_rule,
            "decayed_sum": decayed_sum,
            "conv": conv,
            "experts": experts,
            "routed_attention": routed_attention,
            "routed_delta_rule": routed_delta_rule,
        }
        self._chosen = {op: _choose(op, name, device, dtype) for op, name in asked.items()}

    def softmax(self, *, causal: bool = True) -> SoftmaxAttention:
        return self._chosen["softmax"].build(causal=causal)

    def latent(self, *, causal: bool = True) -> LatentAttention:
        return MaterialisedLatent(self.softmax(causal=causal))

    def delta_rule(self) -> LinearRecurrence:
        return self._chosen["delta_rule"].build()

    def decayed_sum(self) -> LinearRecurrence:
        return self._chosen["decayed_sum"].build()

    def routed_attention(self, **keywords: Any) -> RoutedAttention:
        """keywords: those of the contract's constructor."""
        return self._chosen["routed_attention"].build(**keywords)

    def routed_delta_rule(self, **keywords: Any) -> RoutedRecurrence:
        """keywords: those of the contract's constructor."""
        return self._chosen["routed_delta_rule"].build(**keywords)

    def conv(self) -> CausalConv:
        return self._chosen["conv"].build()

    def experts(self) -> nn.Module:
        """Called with the arguments that `models.ops.experts` describes."""
        return self._chosen["experts"].build()

    def describe(self) -> str:
        """One line for the log."""
        return " ".join(f"{op}={choice.name}" for op, choice in self._chosen.items())


def _choose(op: str, name: str, device: str, dtype: torch.dtype | None) -> Choice:
    choices = [choice for choice in CHOICES if choice.op == op]
    possible = [choice for choice in choices if choice.missing(device, dtype) is None]
    allowed = ", ".join(["auto", *(choice.name for choice in possible)])
    if name == "auto":
        return possible[0]
    for choice in possible:
        if choice.name == name:
            return choice
    reasons = [choice.missing(device, dtype) for choice in choices if choice.name == name]
    reason = reasons[0] if reasons else "does not exist"
    raise ValueError(f"ops.{op}={name} {reason}; allowed here: {allowed}")
