"""Steps of a stream made ready ahead of their use: read, packed and cut, here or by processes.

A loading process gets the pieces of its rows and no plan, and sends steps back by value: through
shared memory they would have to fit into /dev/shm, which in a container may be next to nothing.
"""

import atexit
import multiprocessing
import pickle
import signal
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from parallel.layout import TokenLayout
from trainer.batch import Batch
from trainer.data.dataset import Reader
from trainer.data.steps import RopeSetting
from trainer.data.stream import Order, Stream, TrainStream
from trainer.errors import ConfigError
from trainer.sharder import Sharder
from trainer.signals import STOP_SIGNALS, end_with_parent, ignore_stop_signals

AHEAD = 2  # steps that each process has ready or in the making

Made = tuple[list[Batch], list[TokenLayout]]


class Prepared(NamedTuple):
    """A step before it is taken."""

    batches: list[Batch]
    layouts: list[TokenLayout]
    epoch: int
    rope: RopeSetting
    state: dict[str, Any]  # of the stream behind it


class Loader:
    """Takes the steps of a stream in order. The stream is where its consumer is, however many steps
    processes are ahead.

    workers: processes, started by the first step; 0: none. Used by one thread at a time.
    """

    def __init__(self, stream: Stream, *, sharder: Sharder | None = None, workers: int = 0) -> None:
        """Raises ConfigError for processes on a stream that only one reader can follow."""
        if workers and not isinstance(stream, TrainStream):
            raise ConfigError(f"data.workers={workers}: allowed: 0, as the data is not planned")
        self.stream, self.sharder, self.workers = stream, sharder, workers
        self._sent: Iterator[bytes] | None = None

    def next(self) -> Prepared:
        stream = self.stream
        epoch, rope = stream.epoch, stream.rope
        if self.workers and isinstance(stream, TrainStream):
            made = self._receive(stream)
            stream.cursor += 1
        else:
            made = cut(stream.next_step(), self.sharder)
        return Prepared(*made, epoch, rope, stream.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        self.close()
        self.stream.restore(state)

    def close(self) -> None:
        """Ends the processes."""
        self._sent = None

    def _receive(self, stream: TrainStream) -> Made:
        if self._sent is None:
            self._sent = self._start(stream)
        made: Made | ConfigError = pickle.loads(next(self._sent))
        if isinstance(made, ConfigError):
            raise made
        return made

    def _start(self, stream: TrainStream) -> Iterator[bytes]:
        """Signals are blocked until the processes, which inherit that, ignore them."""
        loader: DataLoader[bytes] = DataLoader(
            _Steps(stream.data.reader, self.sharder),
            batch_size=None,
            sampler=_Orders(stream),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            # The threads of process groups do not survive a fork; imports are done once this way.
            multiprocessing_context="forkserver",
            prefetch_factor=AHEAD,
            generator=torch.Generator(),  # the default one belongs to the run
        )
        others = set(multiprocessing.active_children())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            resource_tracker.ensure_running()  # which unblocks SIGTERM
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            sent = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(_kill, set(multiprocessing.active_children()) - others)
        return sent


def cut(batches: list[Batch], sharder: Sharder | None) -> Made:
    """The parts that this rank holds, where ranks share sequences."""
    return (batches, []) if sharder is None else sharder.step(batches)


class _Steps(Dataset[bytes]):
    """Orders to steps, in a loading process."""

    def __init__(self, reader: Reader, sharder: Sharder | None) -> None:
        self._reader, self._sharder = reader, sharder

    def __getitem__(self, order: Order) -> bytes:
        made: Made | ConfigError
        try:
            made = cut(order.read(self._reader), self._sharder)
        except ConfigError as error:  # in one line, where DataLoader would add a traceback
            made = error
        return pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL)


class _Orders:
    """Of all steps from here on; planned in the training process."""

    def __init__(self, stream: TrainStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Order]:
        return map(self._stream.order, count(self._stream.cursor))


def _begin(worker: int) -> None:
    """A loading process ends with the run, and not before."""
    ignore_stop_signals()
    end_with_parent()


def _kill(processes: Iterable[BaseProcess]) -> None:
    """Of a run that ends without `close`: what multiprocessing would send them, they ignore."""
    for process in processes:
        process.kill()


def _as_it_is(sent: Any) -> Any:
    return sent
