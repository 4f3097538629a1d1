"""The documents of one token store: which are held out, and rows packed from the others."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.batch import IGNORE_INDEX, Run
from trainer.data.plan import LongDocuments, Overlong, Packing, Piece, Plan, make_plan
from trainer.data.rows import Rows
from trainer.data.store import TokenStore
from trainer.errors import ConfigError

Split = Literal["train", "eval", "all"]


class Corpus:
    """A store and how training reads it; `key` is where its keys are in the configuration."""

    def __init__(
        self,
        *,
        store: TokenStore,
        seed: int,
        eval_fraction: float,
        packing: Packing,
        overlong: Overlong,
        long_documents: LongDocuments,
        key: str = "data",
    ) -> None:
        self.store, self.seed, self.eval_fraction, self.key = store, seed, eval_fraction, key
        self.packing, self.overlong, self.long_documents = packing, overlong, long_documents
        self._held_out = held_out(store.digests, eval_fraction)

    def documents(self, split: Split) -> NDArray[np.int64]:
        """Indices of the store's documents in this split; "eval" may be empty."""
        if split == "all":
            return np.arange(len(self.store))
        return np.flatnonzero(self._held_out == (split == "eval"))

    def rows(self, seq_len: int) -> Rows:
        """Raises ConfigError if the policy on long documents leaves nothing, or has no effect."""
        lengths = self.store.lengths[self.documents("train")]
        if self.overlong == "drop" and lengths.min() > seq_len:
            raise ConfigError(
                f"{self.key}.overlong=drop with data.seq_len={seq_len} leaves no document: the "
                f"shortest has {lengths.min()} tokens"
            )
        above = self.long_documents.above
        if above is not None and self.overlong == "drop" and above >= seq_len:
            raise ConfigError(
                f"{self.key}.long_documents.above={above}: with overlong=drop and data.seq_len="
                f"{seq_len} those are left out; allowed: less, or overlong=split"
            )
        return PackedRows(self, seq_len)

    def held_out_plan(self, split: Split, seq_len: int) -> Plan:
        """Each document of the split once, nothing dropped, in the order of the store."""
        documents = self.documents(split)
        return make_plan(documents, self.store.lengths[documents], seq_len=seq_len)

    def identity(self) -> dict[str, str | int | float]:
        """By the full keys of the configuration."""
        long = self.long_documents
        return {
            f"{self.key} token store": self.store.hash,
            f"{self.key}.eval_fraction": self.eval_fraction,
            f"{self.key}.packing": self.packing,
            f"{self.key}.overlong": self.overlong,
            f"{self.key}.long_documents": f"{long.repeat} x above {long.above}",
        }


class PackedRows(Rows):
    """Rows of a corpus; plans are made where they are asked for, so never in a loading process."""

    def __init__(self, corpus: Corpus, seq_len: int) -> None:
        self.seq_len, self._store = seq_len, corpus.store
        self._corpus: Corpus | None = corpus
        self._plans: dict[int, Plan] = {}
        self._count: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a loading process needs."""
        return self.__dict__ | {"_corpus": None, "_plans": {}}

    def plan(self, epoch: int) -> Plan:
        """This epoch's and the one before are kept."""
        if epoch not in self._plans:
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = self._make(epoch)
        return self._plans[epoch]

    def _make(self, epoch: int) -> Plan:
        corpus = self._corpus
        assert corpus is not None, "a loading process makes no plans"
        documents = corpus.documents("train")
        plan = make_plan(
            documents,
            corpus.store.lengths[documents],
            seq_len=self.seq_len,
            packing=corpus.packing,
            overlong=corpus.overlong,
            long_documents=corpus.long_documents,
            shuffle=(corpus.seed, epoch),
        )
        self._count = self._count or plan.rows
        assert plan.rows == self._count, "how full rows get follows from the lengths alone"
        return plan

    def count(self, epoch: int) -> int:
        """The same for each epoch: that one is asked for spares the plans of those before it."""
        return self._count or self.plan(epoch).rows

    def hash(self, epoch: int) -> str:
        return self.plan(epoch).hash

    def identity(self) -> dict[str, str | int | float]:
        assert self._corpus is not None
        return self._corpus.identity()

    def where(self, epoch: int, row: int) -> tuple[Piece, ...]:
        return tuple(self.plan(epoch).row(row))

    def read(self, epoch: int, row: int) -> list[Run]:
        return self.read_at(self.where(epoch, row))

    def read_at(self, where: Sequence[Piece]) -> list[Run]:
        return [self._run(piece) for piece in where]

    def lengths(self, where: Sequence[Piece]) -> list[int]:
        return [piece.length for piece in where]

    def names(self, where: Sequence[Piece]) -> list[str]:
        documents = dict.fromkeys(piece.document for piece in where)
        return [self._store.name(document) for document in documents]

    def _run(self, piece: Piece) -> Run:
        """A piece that does not end its document is labelled by the token behind it."""
        end = piece.start + piece.length
        tokens = self._store.read(piece.document, piece.start, end + 1)
        successor = int(tokens[-1]) if len(tokens) > piece.length else IGNORE_INDEX
        return Run(tokens[: piece.length], successor)


def held_out(digests: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """[documents]: chosen by content, so that copies of a document share a side.

    If nothing were left to train on, nothing is held out.
    """
    chosen = (digests >> np.uint64(11)) * 2.0**-53 < fraction
    return np.zeros_like(chosen) if chosen.all() else chosen
