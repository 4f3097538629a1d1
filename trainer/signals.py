"""What reaches a process from outside: signals that ask it to stop, and its launcher's death."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again

_PR_SET_PDEATHSIG = 1


class StopSignals:
    """While entered, in the main thread, notes the first of these signals instead of ending.

    Nothing is interrupted: who looks at `noted` finishes what is begun, whatever comes meanwhile.
    """

    def __init__(self) -> None:
        self.noted: str | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            signal.siginterrupt(number, False)  # libraries below Python need not expect it
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = self.noted or signal.Signals(number).name


def ignore_stop_signals() -> None:
    """In a process that serves another one, which is asked to stop and ends it when it is done."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_parent() -> None:
    """From here on this process ends when the one that asked multiprocessing for it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def end_with_launcher() -> None:
    """From here on the kernel kills this process when its launcher ends, however that happens.

    Without it the workers of a launcher that was killed would go on beside those of its restart.
    Only Linux can do it, and only torch's elastic launcher is meant: a shell may end before what
    was started in it.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # As the first process of a container the launcher takes all others along by itself.
    orphan = launcher == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    if orphan or os.getppid() != launcher:
        os._exit(1)
