"""What the rest of the machine is doing: two processes on two cores can cost each other 10x."""

import os
import time
from pathlib import Path

QUIET = 0.1  # cores in use by others


def busy_seconds() -> float:
    """Processor seconds used since the machine started, by anyone; those stolen from it too."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields)
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float) -> None:
    """Returns when other processes use less than QUIET cores, or after `patience` seconds."""
    start = time.perf_counter()
    while time.perf_counter() - start < patience:
        busy, now = busy_seconds(), time.perf_counter()
        time.sleep(min(1.0, patience))
        if busy_seconds() - busy < QUIET * (time.perf_counter() - now):
            return
