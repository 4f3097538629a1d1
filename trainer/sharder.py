"""Cuts batches for the ranks that share sequences, and keeps account of how well they were cut."""

from collections.abc import Sequence

import numpy as np

from models.sequence import Fragment
from parallel.layout import LayoutReport, Strategy, TokenLayout, plan_layout
from trainer.batch import Batch

DIGEST_BITS = 24  # the squares of 32,000 digests sum below 2**63


def digest(layouts: Sequence[TokenLayout]) -> int:
    """Equal on two ranks, up to chance, just if they planned the same; 0 for none.

    Tuples of integers hash alike in every process.
    """
    return hash(tuple(layout.ranks for layout in layouts)) % 2**DIGEST_BITS if layouts else 0


class Sharder:
    """The part of one context rank of every batch; each rank plans the same layout by itself."""

    def __init__(
        self, *, rank: int, ranks: int, strategy: Strategy, multiple: int, pad_id: int
    ) -> None:
        self.rank, self.ranks, self.pad_id = rank, ranks, pad_id
        self.strategy, self.multiple = strategy, multiple
        self._sums, self._count = np.zeros(len(LayoutReport._fields)), 0

    def __call__(self, batch: Batch) -> Batch:
        return batch.shard(self.plan(batch), self.rank, pad_id=self.pad_id)

    def plan(self, batch: Batch) -> TokenLayout:
        return self.plan_documents(batch.documents())

    def plan_documents(self, documents: Sequence[Fragment]) -> TokenLayout:
        """documents: of a batch as one sequence."""
        return plan_layout(
            documents,
            ranks=self.ranks,
            strategy=self.strategy,
            multiple=self.multiple,
        )

    def step(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[TokenLayout]]:
        """This rank's part of the micro-batches of a step, and their layouts."""
        layouts = [self.plan(batch) for batch in batches]
        parts = [
            batch.shard(layout, self.rank, pad_id=self.pad_id)
            for batch, layout in zip(batches, layouts, strict=True)
        ]
        return parts, layouts

    def count(self, layouts: Sequence[TokenLayout]) -> None:
        """Takes the layouts of a step that is done into the account."""
        self._sums += np.sum([layout.report() for layout in layouts], axis=0)
        self._count += len(layouts)

    def describe(self) -> str:
        """One line for the log: means over the micro-batches of all steps so far."""
        cut, imbalance, fragments = self._sums / max(self._count, 1)
        return (
            f"{self.strategy} layout: {cut:.1%} of tokens in cut documents, softmax area "
            f"{imbalance:.3f} (max/mean of ranks), {fragments:.1f} fragments a rank"
        )
