"""Two hosts, by network namespaces, whose link is cut: both sides end and say so, and a restart
goes on. Needs Linux, root and `ip`."""

import ctypes
import json
import os
import shutil
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests import launchers
from tests.launch import start
from tests.trainer.tiny import QUICK, build, overrides, records

SECONDS = 3  # of silence


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two namespaces with a link between 10.77.0.1 and 10.77.0.2, its ends named alike."""
    names = [f"lh{os.getpid()}{end}" for end in "ab"]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and `ip`")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for i, name in enumerate(names, start=1):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launch(folder: Path, hosts: list[str], job: dict) -> list[BaseProcess]:
    """torchrun on both hosts, a rank each; lines of errors go to folder/<host>.2."""
    shared = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29501"]
    started = []
    for i, host in enumerate(hosts):
        words = [*shared, f"--node-rank={i}", "-m", "tests.trainer.faulty", str(folder)]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host}
        started.append(start(environment, folder / host, __name__, host, *words, json.dumps([job])))
    return started


def main(host: str, *arguments: str) -> None:
    """torchrun, in a process of its own that goes over to the host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", host).open() as namespace:
        if libc.setns(namespace.fileno(), 0):  # of whichever kind
            raise OSError(ctypes.get_errno(), "setns")
    launchers.main("torch.distributed.run", *arguments)


def error(folder: Path, host: str) -> str:
    lines = (folder / f"{host}.2").read_text().splitlines()
    return next((line for line in lines if line.startswith("error: ")), "")


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_both_sides_of_a_cut_link_end_and_a_restart_goes_on(hosts, tmp_path):
    made = overrides(tmp_path, *QUICK, "trainer.micro_batch_size=2")
    made += ["trainer.steps=100000", "checkpoint.every=3", "logging.every=100"]
    job = {"overrides": [*made, f"trainer.lost_rank_seconds={SECONDS}"], "faults": []}
    hosted = launch(tmp_path, hosts, job)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        saved = tmp_path / "run" / "checkpoints" / "latest"
        wait_for(lambda: saved.exists() and metrics.read_bytes().count(b"\n") > 4, 100)
        ip("-n", hosts[1], "link", "set", hosts[1], "down")
        wait_for(lambda: all(error(tmp_path, host) for host in hosts), SECONDS + 12)
    finally:
        for launcher in hosted:
            launcher.kill()
            launcher.join()
    name = os.uname().nodename
    lost = f"lost rank 1 on {name}: silent for {SECONDS} s"
    assert error(tmp_path, hosts[0]) == f"error: rank 0: {lost}"
    assert error(tmp_path, hosts[1]) == (
        f"error: rank 1: lost other ranks, silent for {SECONDS} s; "
        "nor can the store be reached that all met in"
    )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == lost
    reached = len(records(tmp_path / "run"))
    restarted = build(tmp_path, *made[:-3], f"trainer.steps={reached + 3}")
    # The save before the one that may have been under way was published.
    assert reached - 6 < restarted.step <= reached and restarted.step % 3 == 0
    restarted.run()
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, reached + 4))
