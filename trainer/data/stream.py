"""The training rows of one data rank, step by step, over epoch ends and over resumes."""

from trainer.batch import Batch
from trainer.data.dataset import Data
from trainer.errors import ConfigError


class TrainStream:
    """Each optimiser step takes the next data.batch_size rows of the plan, all ranks together.

    A rank gets a contiguous share of them, in micro-batches. Which rows a step takes depends on
    neither, so a run may resume with other ranks or micro-batches and reads on exactly.
    """

    def __init__(self, data: Data, *, micro_batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        """Raises ConfigError unless data.batch_size divides into ranks x micro_batch_size."""
        check_shares(data.batch_size, micro_batch_size, ranks)
        self.data = data
        self.micro_batch_size, self.rank, self.ranks = micro_batch_size, rank, ranks
        self.epoch = 0  # of the next row
        self._row = 0

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimiser step, equally many on every rank."""
        rows = [self._next_row() for _ in range(self.data.batch_size)]
        share, size = len(rows) // self.ranks, self.micro_batch_size
        own = rows[self.rank * share : (self.rank + 1) * share]
        return [self.data.batch(own[i : i + size]) for i in range(0, share, size)]

    def _next_row(self) -> tuple[int, int]:
        row = self.epoch, self._row
        self._row += 1
        if self._row == self.data.rows_per_epoch(self.epoch):
            self.epoch, self._row = self.epoch + 1, 0
        return row

    def state(self) -> dict:
        """JSON; the same on every rank."""
        return {
            "plan": self.data.plan_hash(self.epoch),
            "made_of": self.data.identity(),
            "epoch": self.epoch,
            "row": self._row,
        }

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken; raises ConfigError naming what differs if it cannot."""
        then, now = state["made_of"], self.data.identity()
        differing = [
            f"{key}={_short(now[key])} (checkpoint: {_short(then.get(key))})"
            for key in now
            if now[key] != then.get(key)
        ]
        if differing:
            raise ConfigError(f"the data may not change on resume: {', '.join(differing)}")
        if self.data.plan_hash(state["epoch"]) != state["plan"]:
            raise ConfigError(
                "the checkpoint's packing plan cannot be made again by this version of the program"
            )
        self.epoch, self._row = state["epoch"], state["row"]


def check_shares(batch_size: int, micro_batch_size: int, ranks: int) -> None:
    """Raises ConfigError unless every rank gets equally many whole micro-batches of a batch."""
    if micro_batch_size < 1:
        raise ConfigError(f"trainer.micro_batch_size={micro_batch_size}: must be at least 1")
    if batch_size % (ranks * micro_batch_size):
        raise ConfigError(
            f"data.batch_size={batch_size}: must be a multiple of {ranks} data ranks x "
            f"trainer.micro_batch_size={micro_batch_size}"
        )


def _short(value: object) -> str:
    return str(value)[:12]  # enough of a hash
