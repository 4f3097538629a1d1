"""Starts ranks: with torchrun, as a user does, by hand, or from a process that has imported all."""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Most of a short launch is importing torch and DeepSpeed; what this process forks has them. One for
# all tests, as Python knows one only.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pytest", "trainer.main", "trainer.engine.accelerate"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(ranks: int, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    """`torchrun arguments` in the repository. Judge it by what it wrote rather than by its exit
    code: a finished process may rarely abort while it exits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
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


def fork(ranks: int, module: str, *arguments: str, seconds: float = 120) -> str:
    """`main(*arguments)` of a module on every rank; -> what they printed.

    Raises AssertionError with that if a rank fails; the others are ended then.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(ranks)]
        processes = [
            FORKSERVER.Process(target=_run, args=(place, output, module, arguments))
            for place, output in zip(places(ranks), outputs, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        for process in processes:
            process.kill()
            process.join()
        said = "".join(output.read_text() for output in outputs if output.exists())
    assert not failed, f"ranks {failed} failed, or took more than {seconds} s:\n{said}"
    return said


def _run(place: dict[str, str], output: Path, module: str, arguments: tuple[str, ...]) -> None:
    import torch

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        os.environ |= place
        torch.set_num_threads(1)
        importlib.import_module(module).main(*arguments)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the threads of a process group can abort a process that Python winds up


def by_hand(ranks: int, *arguments: str, seconds: float = 60) -> list[subprocess.CompletedProcess]:
    """`python arguments` on every rank, without a launcher that would end the others with one."""
    running = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in places(ranks)
    ]
    done = []
    try:
        for process in running:
            out, err = process.communicate(timeout=seconds)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in running:
            process.kill()
    return done
