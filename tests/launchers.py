"""Run in a process that has imported everything: a launcher whose workers are forked from it. Its
agent, its store, its signals and its report of a failure are those of the command."""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests import quick_hydra


class Fork(subprocess.Popen):
    """A process that does what `python -u [-m] NAME ARGUMENTS` would, with no new interpreter."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._environment = environment
        super().__init__(command)

    def _execute_child(self, command: Sequence[str], *_) -> None:
        self._child_created = True
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(list(command[2:])))

    def _run(self, words: list[str]) -> int:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(self._environment)
        try:
            run_as_main(words)
        except SystemExit as stop:
            return stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0


def run_as_main(words: list[str]) -> None:
    """`-m NAME ARGUMENTS` or `FILE ARGUMENTS`."""
    named = words[0] == "-m"
    sys.argv = words[named:]
    run = runpy.run_module if named else runpy.run_path
    run(sys.argv[0], run_name="__main__")


def main(launcher: str, *arguments: str) -> None:
    """`python -m launcher arguments`."""
    quick_hydra.install()
    SubprocessHandler._popen = lambda self, command, environment: Fork(command, environment)
    run_as_main(["-m", launcher, *arguments])
