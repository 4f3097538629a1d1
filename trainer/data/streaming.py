"""Training without a token store: documents are tokenized as they come and packed by windows.

A window is as many documents, one behind the other, as fill so many rows; they are packed best-fit
and the rows shuffled. Slices of the source come in another order in each epoch. All of it follows
from the source, the seed and where the window starts, so a resumed run reads the same rows with any
number of ranks and micro-batches. Every rank reads the whole stream and takes its share.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.batch import IGNORE_INDEX, Batch, Run
from trainer.data.corpus import Split
from trainer.data.part import content_digest
from trainer.data.plan import Piece, Plan, make_plan, permutation
from trainer.data.source import Slice, Source
from trainer.data.steps import RopeSetting, Stage
from trainer.data.stream import check_same, check_shares
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

NAMED_DOCUMENTS = 4  # of a batch, in an error message

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """In the stream, in front of a document: records of a slice, slices of an epoch, epochs."""

    epoch: int = 0
    slice: int = 0  # in the order of the epoch
    record: int = 0  # of the slice


class Document(NamedTuple):
    name: str
    tokens: NDArray[np.integer]  # start and eos included
    end: Position  # behind it


class Packed(NamedTuple):
    """Documents and the rows made of them."""

    documents: list[Document]
    plan: Plan

    def run(self, piece: Piece) -> Run:
        """A piece that does not end its document is labelled by the token behind it."""
        tokens, end = self.documents[piece.document].tokens, piece.start + piece.length
        successor = int(tokens[end]) if end < len(tokens) else IGNORE_INDEX
        return Run(tokens[piece.start : end], successor)


class StreamedData:
    """The documents of a source, each as often as the stream has gone over it.

    stage: the only one, without end; window: rows that documents are packed in together;
    eval_documents: how many held-out ones are evaluated, the first of the source. All held-out
    documents are left out of training.
    """

    def __init__(
        self,
        *,
        source: Source,
        tokenizer: Tokenizer,
        stage: Stage,
        seed: int,
        eval_fraction: float,
        eval_documents: int,
        overlong: str,
        window: int,
    ) -> None:
        for key, value, least in (("window", window, 1), ("eval_documents", eval_documents, 0)):
            if value < least:
                raise ConfigError(f"data.{key}={value}: must be at least {least}")
        self.source, self.tokenizer = source, tokenizer
        self.stages, self.seed = [stage], seed
        self.seq_len, self.batch_size = stage.seq_len, stage.batch_size
        self.workers = 0  # every rank reads all there is, in one place after the other
        self.eval_fraction, self.eval_documents = eval_fraction, eval_documents
        self.overlong, self.window = overlong, window
        self.slices, self._outline = source.slices(), source.outline()

    def identity(self) -> dict[str, str | int | float]:
        """What the order of training rows follows from; a resumed run must have the same."""
        return {
            "data.tokenizer": self.tokenizer.fingerprint,
            "data.streaming source": self._outline,
            "data.seed": self.seed,
            "data.seq_len": self.seq_len,
            "data.batch_size": self.batch_size,
            "data.overlong": self.overlong,
            "data.eval_fraction": self.eval_fraction,
            "data.window": self.window,
        }

    def documents(self, start: Position) -> Iterator[Document]:
        """Of training, from `start` to the end of its epoch."""
        order = permutation(len(self.slices), (self.seed, start.epoch, 2)).tolist()
        for place in range(start.slice, len(order)):
            skipped = start.record if place == start.slice else 0
            at = Position(start.epoch, place, skipped)
            yield from self._read(self.slices[order[place]], at, held_out=False)

    def _read(self, part: Slice, start: Position, *, held_out: bool) -> Iterator[Document]:
        """What a slice has behind `start`, of training or held out from it."""
        records = islice(self.source.read(part), start.record, None)
        for record, (row, content) in enumerate(records, start=start.record + 1):
            if self._is_held_out(content) != held_out:
                continue
            ids = self.tokenizer.encode(content)
            if len(ids):
                yield Document(_name(part, row), self._whole(ids), replace(start, record=record))

    def _whole(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        start, end = self.tokenizer.start, [self.tokenizer.eos_id]
        return np.concatenate([np.array(part, np.int64) for part in (start, ids, end)])

    def _is_held_out(self, content: bytes) -> bool:
        """As a store's documents are."""
        return (content_digest(content) >> 11) * 2.0**-53 < self.eval_fraction

    def pack(self, documents: list[Document], **policy: Any) -> Packed:
        lengths = np.array([len(document.tokens) for document in documents], np.int64)
        index = np.arange(len(documents))
        return Packed(documents, make_plan(index, lengths, seq_len=self.seq_len, **policy))

    def batch(self, rows: Sequence[tuple[Packed, int]], kind: str = "") -> Batch:
        """Rows of windows; one of padding if there is none."""
        pieces = [(packed, packed.plan.row(row)) for packed, row in rows]
        found = dict.fromkeys(
            p.documents[piece.document].name for p, row in pieces for piece in row
        )
        names = list(found)[:NAMED_DOCUMENTS]
        more = " and more" if len(found) > len(names) else ""
        return Batch.from_rows(
            [[packed.run(piece) for piece in row] for packed, row in pieces] or [[]],
            seq_len=self.seq_len,
            pad_id=self.tokenizer.pad_id,
            source=f"{kind}{', '.join(names)}{more}",
        )

    @cached_property
    def _evaluated(self) -> Packed:
        """The first held-out documents of the source, for as long as there are some to find."""
        wanted = self.eval_documents if self.eval_fraction else 0
        found: list[Document] = []
        for part in self.slices if wanted else []:
            documents = self._read(part, Position(), held_out=True)
            found += islice(documents, wanted - len(found))
            if len(found) == wanted:
                break
        logger.info("data: %d documents held out for evaluation", len(found))
        return self.pack(found)

    def eval_batches(
        self, *, micro_batch_size: int, rank: int = 0, ranks: int = 1, split: Split = "eval"
    ) -> Iterator[Batch]:
        """Each of the held-out documents once, in pieces of at most seq_len tokens; there is no
        other split to choose.

        All ranks get equally many batches; where rows run out, one of padding stands in.
        """
        packed = self._evaluated
        for first in range(0, packed.plan.rows, ranks * micro_batch_size):
            start = first + rank * micro_batch_size
            rows = range(start, min(start + micro_batch_size, packed.plan.rows))
            yield self.batch([(packed, row) for row in rows], "evaluation: ")


class DocumentStream:
    """Like `TrainStream`, over `StreamedData`: each optimiser step takes the next batch_size rows.

    Its state is where the window of the next row starts, the window's number, and the row in it.
    """

    rope = RopeSetting()

    def __init__(
        self, data: StreamedData, *, micro_batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        check_shares(data.stages, micro_batch_size, ranks)
        self.data = data
        self.micro_batch_size, self.rank, self.ranks = micro_batch_size, rank, ranks
        self._go_to(Position(), window=0, row=0)

    def _go_to(self, start: Position, *, window: int, row: int) -> None:
        self._start, self._window, self._row = start, window, row
        self._packed: Packed | None = None
        self._reading = self.data.documents(start)
        self._ahead: Document | None = None

    @property
    def epoch(self) -> int:
        """Of the next row."""
        return self._start.epoch

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimiser step, equally many on every rank."""
        rows = [self._next_row() for _ in range(self.data.batch_size)]
        share, size = len(rows) // self.ranks, self.micro_batch_size
        own = rows[self.rank * share : (self.rank + 1) * share]
        return [self.data.batch(own[i : i + size]) for i in range(0, share, size)]

    def _next_row(self) -> tuple[Packed, int]:
        since = self._start.epoch
        while self._packed is None:
            packed, end = self._load()
            if packed.plan.rows:
                self._packed, self._end = packed, end
            elif self._start.epoch > since + 1:  # behind an epoch without any
                raise ConfigError(f"{self.data.source.label}: no document is left to train on")
            else:
                self._pass(end)
        packed, row = self._packed, self._row
        self._row += 1
        if self._row == packed.plan.rows:
            self._pass(self._end)
        return packed, row

    def _load(self) -> tuple[Packed, Position]:
        """The window that starts here, and where the next one does."""
        data, documents, tokens = self.data, list[Document](), 0
        document = self._ahead or next(self._reading, None)
        while document is not None and tokens < data.window * data.seq_len:
            documents.append(document)
            tokens += len(document.tokens)
            document = next(self._reading, None)
        self._ahead = document  # tells whether the epoch goes on
        end = Position(self._start.epoch + 1) if document is None else documents[-1].end
        shuffle = (data.seed, self._window)
        packed = data.pack(documents, overlong=data.overlong, shuffle=shuffle)
        self._report(packed.plan)
        return packed, end

    def _report(self, plan: Plan) -> None:
        """Of the first window, and what the policy on long documents took from any."""
        if self._window == 0:
            logger.info("data: the first window: %s", plan)
        elif plan.dropped_documents:
            logger.info(
                "data: window %d: %d documents above data.seq_len dropped, %d tokens",
                self._window,
                plan.dropped_documents,
                plan.dropped_tokens,
            )

    def _pass(self, end: Position) -> None:
        """On to the next window."""
        if end.epoch != self._start.epoch:
            self._reading = self.data.documents(end)
        self._start, self._window, self._row = end, self._window + 1, 0
        self._packed = None

    def state(self) -> dict:
        """JSON; the same on every rank."""
        return {
            "made_of": self.data.identity(),
            "start": asdict(self._start),
            "window": self._window,
            "row": self._row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; raises ConfigError naming what differs if it cannot."""
        if "window" not in state:
            raise ConfigError(
                "data.streaming=true: the checkpoint was written without; allowed: false"
            )
        check_same(state["made_of"], self.data.identity())
        self._go_to(Position(**state["start"]), window=state["window"], row=state["row"])


def _name(part: Slice, row: int) -> str:
    """Rows are counted in the slice: what lies before it in the file has not been read."""
    return f"{part.name} ({row} from {part.start})" if row else part.name
