"""The short form; README tells of the long one. A process of its own: it preloads its ranks."""

import json
import os
import subprocess
import sys

from tests.launch import ROOT


def test_twenty_kills_change_nothing():
    run = subprocess.run(
        [sys.executable, "-m", "tests.kills", "ranks=2", "trials=20"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["total"] == 20 and report["runs_ended_alike"] >= 4
