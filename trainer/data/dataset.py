"""A token store with a split and a packing policy: rows by (epoch, row), evaluation by document."""

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.batch import IGNORE_INDEX, Batch, Run
from trainer.data.plan import Piece, Plan, make_plan
from trainer.data.store import TokenStore
from trainer.data.task_rows import ExampleTask, TaskRows
from trainer.data.text import Text
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

Split = Literal["train", "eval", "all"]

NAMES_IN_SOURCE = 4  # documents that an error message names

logger = logging.getLogger(__name__)


class Data:
    """Rows of seq_len tokens for training, and each held-out document once for evaluation.

    Raises ConfigError naming the key whose value is not allowed.
    """

    def __init__(
        self,
        *,
        store: TokenStore,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        seed: int,
        eval_fraction: float,
        overlong: str,
        task: ExampleTask | None = None,
    ) -> None:
        """task: makes the rows for training, of the documents of that split."""
        check_values(
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            eval_fraction=eval_fraction,
            overlong=overlong,
        )
        self.store, self.tokenizer = store, tokenizer
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.eval_fraction, self.overlong = eval_fraction, overlong
        self._held_out = held_out(store.digests, eval_fraction)
        self._plans: dict[int, Plan] = {}
        self._task_rows: TaskRows | None = None
        if task is not None:
            self._task_rows = self._rows_of(task)
            logger.info("data: rows of task %s, %d documents", task.name, len(store))
            return
        if not self.plan(0).rows:
            raise ConfigError(
                f"data.overlong=drop with data.seq_len={seq_len} leaves no document: the shortest "
                f"has {store.lengths[self.documents('train')].min()} tokens"
            )
        held = int(self._held_out.sum())
        logger.info("data: %d documents, %d held out; %s", len(store), held, self.plan(0))

    def documents(self, split: Split) -> NDArray[np.int64]:
        """Indices of the store's documents in this split; "eval" may be empty."""
        if split == "all":
            return np.arange(len(self.store))
        return np.flatnonzero(self._held_out == (split == "eval"))

    def plan(self, epoch: int) -> Plan:
        """Rows of the training split; this epoch's and the one before are kept."""
        if epoch not in self._plans:
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            documents = self.documents("train")
            self._plans[epoch] = make_plan(
                documents,
                self.store.lengths[documents],
                seq_len=self.seq_len,
                overlong=self.overlong,
                shuffle=(self.seed, epoch),
            )
        return self._plans[epoch]

    def rows_per_epoch(self, epoch: int) -> int:
        return self.plan(epoch).rows if self._task_rows is None else self._task_rows.count(epoch)

    def plan_hash(self, epoch: int) -> str:
        return self.plan(epoch).hash if self._task_rows is None else self._task_rows.hash(epoch)

    def batch(self, rows: Sequence[tuple[int, int]]) -> Batch:
        """Training rows, each an (epoch, row)."""
        source = ", ".join(f"epoch {epoch} row {row}" for epoch, row in rows)
        if self._task_rows is not None:
            made = [self._task_rows.read(*row) for row in rows]
            return Batch.from_rows(
                made, seq_len=self.seq_len, pad_id=self.tokenizer.pad_id, source=source
            )
        return self._batch([self.plan(epoch).row(row) for epoch, row in rows], source)

    def eval_batches(
        self, *, micro_batch_size: int, rank: int = 0, ranks: int = 1, split: Split = "eval"
    ) -> Iterator[Batch]:
        """Each document of the split once, in pieces of at most seq_len tokens, nothing dropped.

        A token with a successor is scored on one rank, once. All ranks get equally many batches,
        so that each forward pass meets its peers; where rows run out, one of padding stands in.
        """
        documents = self.documents(split)
        plan = make_plan(documents, self.store.lengths[documents], seq_len=self.seq_len)
        for first in range(0, plan.rows, ranks * micro_batch_size):
            start = first + rank * micro_batch_size
            rows = range(start, min(start + micro_batch_size, plan.rows))
            pieces = [plan.row(row) for row in rows] or [[]]
            yield self._batch(pieces, f"evaluation, {len(rows)} rows from {start}")

    def identity(self) -> dict[str, str | int | float]:
        """What the order of training rows follows from; a resumed run must have the same."""
        return self._facts if self._task_rows is None else self._task_rows.identity()

    def _rows_of(self, task: ExampleTask) -> TaskRows:
        text = Text(self.store, self.tokenizer, self.documents("train"))
        options = {f"tasks.{task.name}.{key}": str(x) for key, x in vars(task).items()}
        facts = {**self._facts, "data.task": task.name, **options}
        return TaskRows(task, text, seq_len=self.seq_len, seed=self.seed, identity=facts)

    @property
    def _facts(self) -> dict[str, str | int | float]:
        return {
            "data.tokenizer": self.tokenizer.fingerprint,
            "token store": self.store.hash,
            "data.seed": self.seed,
            "data.seq_len": self.seq_len,
            "data.batch_size": self.batch_size,
            "data.overlong": self.overlong,
            "data.eval_fraction": self.eval_fraction,
        }

    def _batch(self, rows: Sequence[Sequence[Piece]], where: str) -> Batch:
        documents = dict.fromkeys(piece.document for row in rows for piece in row)
        names = [self.store.name(document) for document in list(documents)[:NAMES_IN_SOURCE]]
        more = len(documents) - len(names)
        return Batch.from_rows(
            [[self._run(piece) for piece in row] for row in rows],
            seq_len=self.seq_len,
            pad_id=self.tokenizer.pad_id,
            source=f"{where}: {', '.join(names)}" + (f" and {more} more" if more else ""),
        )

    def _run(self, piece: Piece) -> Run:
        """A piece that does not end its document is labelled by the token behind it."""
        end = piece.start + piece.length
        tokens = self.store.read(piece.document, piece.start, end + 1)
        successor = int(tokens[-1]) if len(tokens) > piece.length else IGNORE_INDEX
        return Run(tokens[: piece.length], successor)


def check_values(
    *, seq_len: int, batch_size: int, seed: int, eval_fraction: float, overlong: str
) -> None:
    """Raises ConfigError for what no documents could make right."""
    for key, value, least in (
        ("data.seq_len", seq_len, 1),
        ("data.batch_size", batch_size, 1),
        ("data.seed", seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{key}={value}: must be at least {least}")
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction={eval_fraction}: must be in [0, 1)")
    if overlong not in ("split", "drop"):
        raise ConfigError(f"data.overlong={overlong}: must be split or drop")


def held_out(digests: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """[documents]: chosen by content, so that copies of a document share a side.

    If nothing were left to train on, nothing is held out.
    """
    chosen = (digests >> np.uint64(11)) * 2.0**-53 < fraction
    return np.zeros_like(chosen) if chosen.all() else chosen
