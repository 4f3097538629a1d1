"""The training rows of one data rank, step by step, over epoch ends, stages and resumes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from trainer.batch import Batch
from trainer.data.balance import RowCost, spread
from trainer.data.dataset import Data, Located, Reader
from trainer.data.steps import RopeSetting, Stage
from trainer.errors import ConfigError


class Stream(Protocol):
    """What training reads, step by step."""

    @property
    def epoch(self) -> int:
        """Of the next step."""
        ...

    @property
    def rope(self) -> RopeSetting:
        """Of the next step."""
        ...

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimiser step, equally many on every rank."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON; the same on every rank."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; raises ConfigError naming what differs if it cannot."""
        ...


class Order(NamedTuple):
    """One rank's part of a step, before it is read."""

    seq_len: int
    micro_batches: list[list[Located]]

    def read(self, reader: Reader) -> list[Batch]:
        return [reader.batch(rows, self.seq_len) for rows in self.micro_batches]


class TrainStream:
    """Each optimiser step takes the rows that `Steps` says, all ranks together.

    A rank gets its share of them, in micro-batches. Which rows a step takes depends on neither, so
    a run may resume with other ranks or micro-batches and reads on exactly. Shares are contiguous,
    or, with a cost of rows, such that their costs are even.
    """

    def __init__(
        self,
        data: Data,
        *,
        micro_batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        cost: RowCost | None = None,
    ) -> None:
        """Raises ConfigError unless each batch size divides into ranks x micro_batch_size."""
        check_shares(data.steps.stages, micro_batch_size, ranks)
        self.data, self.cost = data, cost
        self.micro_batch_size, self.rank, self.ranks = micro_batch_size, rank, ranks
        self.cursor = 0  # steps read so far

    @property
    def epoch(self) -> int:
        return self.data.steps.epoch(self.cursor)

    @property
    def rope(self) -> RopeSetting:
        return self.data.steps.stage(self.cursor).rope

    def order(self, cursor: int) -> Order:
        """This rank's part of the step behind `cursor` steps."""
        steps, size = self.data.steps, self.micro_batch_size
        seq_len = steps.stage(cursor).seq_len
        rows = self.data.locate(steps.rows(cursor), seq_len)
        if self.cost is not None:
            costs = self.cost.of_rows(self.data.lengths(rows, seq_len), seq_len)
            rows = [rows[i] for i in spread(costs, ranks=self.ranks, size=size)]
        share = len(rows) // self.ranks
        own = rows[self.rank * share : (self.rank + 1) * share]
        return Order(seq_len, [own[i : i + size] for i in range(0, share, size)])

    def next_step(self) -> list[Batch]:
        batches = self.order(self.cursor).read(self.data.reader)
        self.cursor += 1
        return batches

    def state(self) -> dict[str, Any]:
        return {
            "plan": self.data.steps.hash(self.cursor),
            "cursor": self.cursor,
            "made_of": self.data.identity(self.cursor),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if "cursor" not in state:
            raise ConfigError(
                "data.streaming=false: the checkpoint has no position in a packing plan; it was "
                "written with true, or by an earlier version of the program"
            )
        cursor = state["cursor"]
        check_same(state["made_of"], self.data.identity(cursor), self._key)
        if self.data.steps.hash(cursor) != state["plan"]:
            raise ConfigError(
                "the checkpoint's packing plan cannot be made again by this version of the program"
            )
        self.cursor = cursor

    def _key(self, key: str) -> str:
        """Without stages in the configuration there is one, made of the section's own keys."""
        alone = len(self.data.steps.stages) == 1
        return key.replace("data.stages[0].", "data.") if alone else key


def check_same(
    then: Mapping[str, object],
    now: Mapping[str, object],
    named: Callable[[str], str] = str,
) -> None:
    """Raises ConfigError naming what a checkpoint's stream was made of and this one is not.

    named: from a fact to the key that it stands under in the configuration.
    """
    differing = [
        f"{named(key)}={_short(now.get(key))} (checkpoint: {_short(then.get(key))})"
        for key in {**now, **then}
        if now.get(key) != then.get(key)
    ]
    if differing:
        raise ConfigError(f"the data may not change on resume: {', '.join(differing)}")


def check_shares(stages: Sequence[Stage], micro_batch_size: int, ranks: int) -> None:
    """Raises ConfigError unless every rank gets equally many whole micro-batches of each batch."""
    if micro_batch_size < 1:
        raise ConfigError(f"trainer.micro_batch_size={micro_batch_size}: must be at least 1")
    for i, stage in enumerate(stages):
        if stage.batch_size % (ranks * micro_batch_size):
            key = "data" if len(stages) == 1 else f"data.stages[{i}]"
            raise ConfigError(
                f"{key}.batch_size={stage.batch_size}: must be a multiple of {ranks} data ranks x "
                f"trainer.micro_batch_size={micro_batch_size}"
            )


def _short(value: object) -> str:
    return "none" if value is None else str(value)[:12]  # enough of a hash
