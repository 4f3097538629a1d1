"""torchrun, for runs that something else may stop: a scheduler, a container's supervisor.

Told to stop, torchrun kills its workers after 30 s, which is too short to save a large model, and
before torch 2.12 it cannot be told otherwise. Here it never hears of it: the signal goes to the
workers as it is, they save and end by themselves, and torchrun ends with them.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import run

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_TORCHRUNS = "SIGINT,SIGHUP,SIGQUIT"  # which it passes on, and kills after 30 s


def launch(arguments: Sequence[str]) -> None:
    """Like the command torchrun with these arguments."""
    for number in STOP:
        signal.signal(number, _pass_on)
    run.main([f"--signals-to-handle={_TORCHRUNS}", *store_host(arguments, os.environ), *arguments])


def store_host(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Under Slurm, the option that makes the first node keep the store of the rendezvous.

    torchrun would compare the endpoint with names of the machine, which need not hold: an address
    of a fast network is none of them.
    """
    node = environ.get("SLURM_NODEID")
    if node is None or not any(argument.startswith("--rdzv-endpoint") for argument in arguments):
        return []
    return [f"--rdzv-conf=is_host={int(node == '0')}"]


def _pass_on(number: int, frame: FrameType | None) -> None:
    workers = children(os.getpid())
    if not workers:  # still waiting for the other nodes
        sys.exit(128 + number)
    for pid in workers:
        os.kill(pid, number)


def children(parent: int) -> list[int]:
    """The processes that `parent` started and has not yet seen end."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent ...; the name may hold anything.
            fields = re.sub(r"\(.*\)", "", path.read_text(), flags=re.DOTALL).split()
        except OSError:
            continue  # it has ended
        if int(fields[2]) == parent:
            found.append(int(fields[0]))
    return found
