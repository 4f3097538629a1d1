"""Kernels of the package flash-linear-attention, for CUDA.

They take one flat row of sequences, each with its own initial state.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.conv import behind, pieces
from models.ops.decayed_sum import DecayedSum
from models.ops.runs import runs
from models.precision import full_precision
from models.sequence import CausalConv, LinearRecurrence, Recurrent, SequenceInfo, per_layout


class Sequences(NamedTuple):
    """The sequences of a flattened batch: a new one for every run of a row."""

    bounds: Tensor  # [sequences + 1] int64
    first: Tensor  # [batch] int64, each row's first sequence
    last: Tensor  # [batch] int64


@per_layout
def sequences(info: SequenceInfo, device: torch.device) -> Sequences:
    bounds, first, last = [0], [], []
    for row in info.fragments:
        first.append(len(bounds) - 1)
        bounds += [bounds[-1] + run.stop for run in runs(row)]
        last.append(len(bounds) - 2)
    return Sequences(*(torch.tensor(x, device=device) for x in (bounds, first, last)))


class FlaDeltaRule(LinearRecurrence):
    """`chunk_kda` or, for one decay per head, `chunk_gated_delta_rule`; matrix products in the
    dtype of v, gates and states in fp32."""

    @torch.compiler.disable
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
        *,
        initial_state: Tensor | None = None,
    ) -> Recurrent:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.kda import chunk_kda

        kernel = chunk_kda
        if log_decay.shape[-1] == 1:
            kernel, log_decay = chunk_gated_delta_rule, log_decay.squeeze(-1)
        tensors = q.to(v.dtype), k.to(v.dtype), v, log_decay.float(), beta.float()
        return _recur(kernel, tensors, info, initial_state)


class FlaDecayedSum(DecayedSum):
    """`chunk_simple_gla`; matrix products in the dtype of v, decays and states in fp32."""

    @torch.compiler.disable
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        info: SequenceInfo,
        *,
        initial_state: Tensor | None = None,
    ) -> Recurrent:
        from fla.ops.simple_gla import chunk_simple_gla

        written = (v * beta.unsqueeze(-1)).to(v.dtype)
        tensors = q.to(v.dtype), k.to(v.dtype), written, log_decay.squeeze(-1).float()
        return _recur(chunk_simple_gla, tensors, info, initial_state)


def _recur(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    tensors: tuple[Tensor, ...],
    info: SequenceInfo,
    initial_state: Tensor | None,
) -> Recurrent:
    """tensors: q, k, v, then what the kernel takes; each run of a row a sequence of its own."""
    q, _, v, *_ = tensors
    packed = sequences(info, q.device)
    states = None
    if initial_state is not None:
        keeps = (info.positions[:, 0] > 0)[:, None, None, None]
        entering = torch.where(keeps, initial_state.float(), 0)
        states = entering.new_zeros(len(packed.bounds) - 1, *entering.shape[1:])
        states = states.index_copy(0, packed.first, entering)
    with full_precision(q):
        output, final = kernel(
            *(x.flatten(0, 1).unsqueeze(0) for x in tensors),
            scale=1.0,
            initial_state=states,
            output_final_state=True,
            cu_seqlens=packed.bounds,
        )
    return Recurrent(output.view_as(v), final[packed.last])


class FlaConv(CausalConv):
    """`causal_conv1d`; a history joins its row as a part of the first sequence."""

    @torch.compiler.disable
    def forward(
        self, x: Tensor, weight: Tensor, info: SequenceInfo, *, history: Tensor | None = None
    ) -> Tensor:
        from fla.modules.causal_conv1d import causal_conv1d

        known = 0 if history is None else weight.shape[1] - 1
        tokens = x if history is None else behind(history, x, known)
        bounds = _conv_bounds(info, known, x.device)
        with full_precision(x):
            flat = tokens.flatten(0, 1).unsqueeze(0)
            output, _ = causal_conv1d(flat, weight.to(x.dtype), cu_seqlens=bounds)
        return output.view_as(tokens)[:, known:]


@per_layout
def _conv_bounds(info: SequenceInfo, known: int, device: torch.device) -> Tensor:
    """Starts of what each run sees; history that none sees is a sequence of its own."""
    starts: list[int] = []
    for i, row in enumerate(info.fragments):
        found = pieces(row, known)
        seq = found[-1].stop
        starts += sorted({i * seq, *(i * seq + piece.first for piece in found)})
    return torch.tensor([*starts, len(info.fragments) * seq], device=device)
