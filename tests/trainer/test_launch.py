"""A launcher that passes the signal to stop on to its workers, and waits."""

import os
import signal
import subprocess
import sys

import pytest

from tests.launch import ROOT
from trainer.launch import children, store_host

WORKER = """
import os, signal, sys, time
noted = []
signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
print("ready", flush=True)
while not noted:
    time.sleep(0.05)
print("saved by rank", os.environ["RANK"], flush=True)
sys.exit(75)
"""


def test_workers_are_told_and_end_by_themselves(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "scripts/launch.py", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*command, str(tmp_path / "worker.py")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as launcher:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        assert len(children(launcher.pid)) == 2
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert sorted(out.splitlines()) == ["saved by rank 0", "saved by rank 1"]
    assert "exitcode  : 75" in err and "SignalException" not in err


@pytest.mark.parametrize(
    ("arguments", "environ", "options"),
    [
        (["--rdzv-endpoint=n1:1"], {"SLURM_NODEID": "0"}, ["--rdzv-conf=is_host=1"]),
        (["--rdzv-endpoint=n1:1"], {"SLURM_NODEID": "3"}, ["--rdzv-conf=is_host=0"]),
        (["--standalone"], {"SLURM_NODEID": "0"}, []),
        (["--rdzv-endpoint=n1:1"], {}, []),
    ],
)
def test_under_slurm_the_first_node_keeps_the_store(arguments, environ, options):
    assert store_host(arguments, environ) == options
