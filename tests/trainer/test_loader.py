"""Steps that processes read ahead: the same as a thread's, and the processes live as the run."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.launch import alone
from tests.trainer.data.helpers import build, write_documents
from trainer.batch import Batch
from trainer.data import TrainStream
from trainer.data.store import TokenStore
from trainer.errors import ConfigError
from trainer.loader import AHEAD, Loader
from trainer.sharder import Sharder

STAGES = [{"tokens": 2 * 8 * 16}, {"seq_len": 32, "batch_size": 4, "rope": {"base": 7.0}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    write_documents(folder / "text")
    return folder


def loader(folder, workers, **changes):
    stream = TrainStream(build(folder, **{"stages": STAGES} | changes), micro_batch_size=2)
    sharder = Sharder(rank=1, ranks=2, strategy="balanced", multiple=1, pad_id=257)
    return Loader(stream, sharder=sharder, workers=workers)


def same(first: Batch, second: Batch) -> bool:
    pairs = [(first.tokens, second.tokens), (first.labels, second.labels)]
    pairs += [(getattr(first.info, k), getattr(second.info, k)) for k in ("index", "positions")]
    facts = (first.info.fragments, first.info.peers, first.source, first.valid_labels)
    others = (second.info.fragments, second.info.peers, second.source, second.valid_labels)
    return all(torch.equal(a, b) for a, b in pairs) and facts == others


def test_processes_read_what_a_thread_reads_and_heed_nobody(folder):
    thread, shared = loader(folder, 0), loader(folder, 2)
    generator = torch.random.get_rng_state()
    planned = []
    order = shared.stream.order
    shared.stream.order = lambda cursor: planned.append(cursor) or order(cursor)
    for step in range(6):
        expected, got = thread.next(), shared.next()
        assert all(map(same, got.batches, expected.batches)) and len(got.batches) > 1
        assert got[1:] == expected[1:]
        assert got.state["cursor"] == step + 1 == shared.stream.cursor
        assert max(planned) <= step + 2 * AHEAD  # and no further
        for process in multiprocessing.active_children():
            os.kill(process.pid, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2][step % 3])
    assert got.epoch > 0 and got.rope.base == 7.0
    assert torch.equal(torch.random.get_rng_state(), generator)
    shared.restore({**thread.stream.state()})
    assert not multiprocessing.active_children()
    thread.next()
    state = thread.stream.state()
    expected = thread.next()
    shared.restore(state)
    assert all(map(same, shared.next().batches, expected.batches))
    shared.close()


def test_what_a_process_cannot_read_is_one_line(folder):
    broken = loader(folder, 1)
    store: TokenStore = broken.stream.data.corpora[""].store
    broken.stream.data.reader._rows["", 16]._store = Unreadable(store)
    with pytest.raises(ConfigError, match=r"^token store x is damaged$"):
        broken.next()
    broken.close()


class Unreadable:
    def __init__(self, store):
        self.lengths = None

    def read(self, *where):
        raise ConfigError("token store x is damaged")


def test_processes_end_with_the_run_however_it_ends(folder):
    run = alone("tests.trainer.test_loader", str(folder))
    assert run.returncode == -signal.SIGKILL, run.stderr
    (pid,) = map(int, run.stdout.split())
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "(zombie)" not in status(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def main(folder: str) -> None:
    """Kills itself, while its process waits for something to do."""
    reading = loader(Path(folder), 1)
    reading.next()
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "(zombie)"


def test_a_stream_without_a_plan_has_one_reader(folder):
    class Unplanned:
        pass

    with pytest.raises(ConfigError, match=r"data\.workers=2: allowed: 0"):
        Loader(Unplanned(), workers=2)
