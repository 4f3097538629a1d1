"""What a run trains on and is evaluated on: sources of rows, the steps made of them, documents."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.batch import Batch
from trainer.data.corpus import Corpus, PackedRows, Split
from trainer.data.rows import Rows, RowSource
from trainer.data.steps import RowId, Stage, Steps, interleave
from trainer.data.tokenizer import Tokenizer

NAMED_DOCUMENTS = 4  # of a batch, in an error message

Located = tuple[RowId, Any]  # a row, and where it lies by its `Rows`


class Reader:
    """Rows to batches. It holds no plan, so that a loading process can have one too."""

    def __init__(self, rows: Mapping[tuple[str, int], Rows], pad_id: int) -> None:
        """rows: by source and sequence length."""
        self._rows, self._pad_id = rows, pad_id

    def batch(self, located: Sequence[Located], seq_len: int, kind: str = "") -> Batch:
        """A row of padding stands in for none; kind: of the rows, for messages."""
        runs, labels = [], []
        names: dict[str, None] = {}
        for (source, epoch, row), where in located:
            rows = self._rows[source, seq_len]
            runs.append(rows.read_at(where))
            labels.append(f"{source} epoch {epoch} row {row}".lstrip())
            if len(names) <= NAMED_DOCUMENTS:
                names |= dict.fromkeys(rows.names(where))
        told = ", ".join(list(names)[:NAMED_DOCUMENTS])
        more = " and more" if len(names) > NAMED_DOCUMENTS else ""
        return Batch.from_rows(
            runs or [[]],
            seq_len=seq_len,
            pad_id=self._pad_id,
            source=f"{kind}{', '.join(labels)}: {told}{more}",
        )


class Data:
    """Steps of training rows, and each held-out document once for evaluation.

    sources: by name, that of an only one is empty; seq_len: of evaluation, and of stages that say
    nothing else; balance, workers: how they are to be read. Raises ConfigError for rows that cannot
    be made.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, RowSource],
        tokenizer: Tokenizer,
        stages: Sequence[Stage],
        seq_len: int,
        seed: int,
        balance: bool = False,
        workers: int = 0,
    ) -> None:
        self.sources, self.tokenizer = sources, tokenizer
        self.seq_len, self.seed = seq_len, seed
        self.balance, self.workers = balance, workers
        self._rows = {
            (name, length): source.rows(length)
            for name, source in sources.items()
            for length in dict.fromkeys(s.seq_len for s in stages if s.weights.get(name))
        }
        self.steps = Steps(stages, self.rows)
        self.reader = Reader(self._rows, tokenizer.pad_id)

    @property
    def stages(self) -> list[Stage]:
        return self.steps.stages

    @property
    def corpora(self) -> dict[str, Corpus]:
        """The sources that are documents, by name."""
        return {name: made for name, made in self.sources.items() if isinstance(made, Corpus)}

    def rows(self, source: str, seq_len: int) -> Rows:
        """Of a source at the length of one of the stages that read it."""
        return self._rows[source, seq_len]

    def locate(self, rows: Sequence[RowId], seq_len: int) -> list[Located]:
        return [(id_, self.rows(id_.source, seq_len).where(id_.epoch, id_.row)) for id_ in rows]

    def lengths(self, located: Sequence[Located], seq_len: int) -> list[list[int]]:
        """Of the documents in each row."""
        return [self.rows(id_.source, seq_len).lengths(where) for id_, where in located]

    def eval_batches(
        self, *, micro_batch_size: int, rank: int = 0, ranks: int = 1, split: Split = "eval"
    ) -> Iterator[Batch]:
        """Each document of the split once, in pieces of at most seq_len tokens, nothing dropped.

        Rows of several corpora come in turn, each in proportion. A token with a successor is scored
        on one rank, once. All ranks get equally many batches, so that each forward pass meets its
        peers; where rows run out, one of padding stands in.
        """
        corpora = self.corpora
        names = list(corpora)
        plans = [corpus.held_out_plan(split, self.seq_len) for corpus in corpora.values()]
        owners, places = interleave(np.array([plan.rows for plan in plans], np.int64))
        packed = {(n, self.seq_len): PackedRows(c, self.seq_len) for n, c in corpora.items()}
        reader = Reader(packed, self.tokenizer.pad_id)
        for first in range(0, len(places), ranks * micro_batch_size):
            start = first + rank * micro_batch_size
            part = slice(start, start + micro_batch_size)
            rows = zip(owners[part].tolist(), places[part].tolist(), strict=True)
            located = [(RowId(names[i], 0, row), plans[i].row(row)) for i, row in rows]
            yield reader.batch(located, self.seq_len, kind="evaluation, ")

    def identity(self, cursor: int | None = None) -> dict[str, Any]:
        """What the first `cursor` steps follow from; all that are to come without one."""
        last = self.steps.first[-1] + 1 if cursor is None else cursor
        facts = {"data.tokenizer": self.tokenizer.fingerprint, "data.seed": self.seed}
        for stage in self.steps.begun(last):
            for name in stage.sources():
                facts |= self.rows(name, stage.seq_len).identity()
        return facts | self.steps.facts(last)
