"""Starts ranks: with torchrun, as a user does, or by a process that has imported everything,
which tests.launchers can make a launcher."""

import contextlib
import importlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
TORCHRUN = ("torch.distributed.run", "--standalone")  # of which tests.launchers makes a process

# Most of a short launch is the import of torch and DeepSpeed, which this process has behind it; one
# for all tests, as Python knows only one.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("pytest", "trainer.main", "trainer.engine.accelerate", "trainer.engine.deepspeed"),
        "deepspeed.runtime.zero.muon.muon_optimizer",  # its first engine imports all of Inductor
        "tests.preloaded",
    ]
)


def free_port() -> int:
    """None of those that the kernel hands out: it could give this one away before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def torchrun(ranks: int, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    """`torchrun arguments` in the repository. Judge it by what it wrote rather than by its exit
    code: a finished process may rarely abort while it exits."""
    command = [sys.executable, "-m", *TORCHRUN]
    return subprocess.run(
        [*command, f"--nproc-per-node={ranks}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def places(ranks: int) -> list[dict[str, str]]:
    """The environment of each of some ranks on this machine that are to meet."""
    port = str(free_port())
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    return [
        together | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        for rank in range(ranks)
    ]


def forked(
    ranks: int, module: str, *arguments: str, seconds: float = 60
) -> list[subprocess.CompletedProcess]:
    """`main(*arguments)` of a module on every rank, with no launcher that would end the others with
    one; those that take longer are killed."""
    return _forked(places(ranks), module, arguments, seconds)


def alone(
    module: str, *arguments: str, environment: dict[str, str] | None = None, seconds: float = 60
) -> subprocess.CompletedProcess:
    """The same in one process without a launcher's environment, with this one beside its own."""
    (done,) = _forked([environment or {}], module, arguments, seconds)
    return done


def _forked(
    environments: list[dict[str, str]], module: str, arguments: tuple[str, ...], seconds: float
) -> list[subprocess.CompletedProcess]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(len(environments))]
        processes = [
            start(environment, file, module, *arguments)
            for environment, file in zip(environments, files, strict=True)
        ]
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        for process in processes:
            process.kill()
            process.join()
        return [
            subprocess.CompletedProcess(
                arguments, process.exitcode, *(_text(file.with_suffix(f".{i}")) for i in (1, 2))
            )
            for process, file in zip(processes, files, strict=True)
        ]


def fork(ranks: int, module: str, *arguments: str, seconds: float = 120) -> str:
    """The same where no rank is to fail; -> what all printed. Raises AssertionError with that.

    As under torchrun, ranks meet in a store that is there before them: one that finds none yet
    sleeps half a second, in every job.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    kept["TORCHELASTIC_RESTART_COUNT"] = "0"
    environments = [place | kept for place in places(ranks)]
    done = _forked(environments, module, arguments, seconds)
    said = "".join(rank.stderr + rank.stdout for rank in done)
    codes = [rank.returncode for rank in done]
    assert not any(codes), f"the ranks ended with {codes}:\n{said}"
    return said


def start(environment: dict[str, str], file: Path, module: str, *arguments: str) -> BaseProcess:
    """`main(*arguments)` of a module in a process of its own, with this environment beside that of
    the tests. What it prints goes to the file with the suffixes .1 and .2, for standard error."""
    process = FORKSERVER.Process(target=_run, args=(environment, file, module, arguments))
    process.start()
    return process


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _run(environment: dict[str, str], file: Path, module: str, arguments: tuple[str, ...]) -> None:
    import torch

    for descriptor in (1, 2):
        with file.with_suffix(f".{descriptor}").open("w") as output:
            os.dup2(output.fileno(), descriptor)
    code = 1
    FORKSERVER.set_forkserver_preload(["trainer.loader"])  # of its own, for loading processes
    try:
        os.environ |= environment
        torch.set_num_threads(1)
        importlib.import_module(module).main(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the threads of a process group can abort a process that Python winds up
