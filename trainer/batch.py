"""What a model reads in one forward pass: tokens, labels, and where each token sits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.sequence import Fragment, SequenceInfo
from parallel.layout import TokenLayout

IGNORE_INDEX = -100  # the label of a token that nothing is to be predicted from


class Run(NamedTuple):
    """Consecutive tokens of one document."""

    tokens: NDArray[np.integer]
    successor: int = IGNORE_INDEX  # the token behind the last one, if the document goes on
    labels: NDArray[np.integer] | None = None  # of each token, where not all next tokens count

    def all_labels(self) -> NDArray[np.integer]:
        """[tokens]: what is to be predicted from each, IGNORE_INDEX where nothing is."""
        if self.labels is None:
            return np.append(self.tokens[1:].astype(np.int64), self.successor)
        if self.labels.shape != self.tokens.shape:
            raise ValueError(f"{len(self.labels)} labels for {len(self.tokens)} tokens")
        return self.labels


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of packed documents; a label is the next token of the same document, if it counts."""

    tokens: Tensor  # [batch, seq] int64
    labels: Tensor  # [batch, seq] int64, IGNORE_INDEX at document ends and on padding
    info: SequenceInfo
    valid_labels: int  # labels other than IGNORE_INDEX, counted on the host
    source: str = ""  # rows and documents, for error messages

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[Run]], *, seq_len: int, pad_id: int, source: str = ""
    ) -> "Batch":
        """Packs each row's runs from the left and pads it to seq_len; a row may have none.

        Runs do not see each other, even two of one document. Raises ValueError if a run is empty
        or has not a label a token, or a row's runs hold more than seq_len tokens.
        """
        tokens = np.full((len(rows), seq_len), pad_id, np.int64)
        labels = np.full((len(rows), seq_len), IGNORE_INDEX, np.int64)
        padding = []
        for i, row in enumerate(rows):
            filled = 0
            for run in row:
                end = filled + len(run.tokens)
                if not filled < end <= seq_len:
                    raise ValueError(f"row {i}: a run from {filled} to {end} of {seq_len} tokens")
                tokens[i, filled:end] = run.tokens
                labels[i, filled:end] = run.all_labels()
                filled = end
            padding.append(seq_len - filled)
        lengths = [[len(run.tokens) for run in row] for row in rows]
        return cls(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            info=SequenceInfo.from_lengths(lengths, padding=padding),
            valid_labels=int((labels != IGNORE_INDEX).sum()),
            source=source,
        )

    def documents(self) -> list[Fragment]:
        """Documents and padding of all rows, one row behind the other in one packed sequence."""
        return one_sequence(self.info)

    def shard(self, layout: TokenLayout, rank: int, *, pad_id: int) -> "Batch":
        """The one row that a context rank holds under a layout of `documents()`."""
        index = torch.from_numpy(layout.index(rank))
        padding = index < 0

        def row(x: Tensor, fill: int) -> Tensor:
            return x.flatten()[index.clamp(min=0)].masked_fill(padding, fill).unsqueeze(0)

        labels = row(self.labels, IGNORE_INDEX)
        return replace(
            self,
            tokens=row(self.tokens, pad_id),
            labels=labels,
            info=layout.info(rank),
            valid_labels=int((labels != IGNORE_INDEX).sum()),
        )

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            info=self.info.to(device),
        )


def one_sequence(info: SequenceInfo) -> list[Fragment]:
    """The fragments of all rows, one row behind the other."""
    _, seq = info.shape
    return [
        replace(fragment, index=row * seq + fragment.index)
        for row, fragments in enumerate(info.fragments)
        for fragment in fragments
    ]
