"""A real Slurm of two nodes on this machine, in a folder of its own: munge, a controller, two
daemons. Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge

`with cluster(folder):` runs it; sbatch and its kin find it through SLURM_CONF. All of it belongs to
this user, nothing of the machine's own configuration is read or written.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SYSTEM = "/usr/sbin:/sbin"  # not on everyone's path
START_SECONDS = 60.0

# A job of `high` preempts one of `low`, which has 60 s to end and is requeued. A requeued job
# waits for cred_expire, 120 s by default.
CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=n1,n2 PriorityTier=1 GraceTime=60 Default=YES MaxTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def missing() -> str | None:
    """Why no Slurm can run here; None if it can."""
    path = f"{os.environ['PATH']}:{SYSTEM}"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return f"needs {', '.join(absent)}" if absent else None


@contextlib.contextmanager
def cluster(folder: Path, *, proctrack: str = "linuxproc") -> Iterator[None]:
    """Raises RuntimeError, with the last lines of the logs, if the nodes do not come up."""
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir(parents=True)
    names = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser()}
    facts = {"folder": folder, "ports": free_ports(3), "proctrack": proctrack}
    (folder / "slurm.conf").write_text(CONF.format(**names, **facts))
    place = {"PATH": f"{os.environ['PATH']}:{SYSTEM}", "SLURM_CONF": str(folder / "slurm.conf")}
    with mock.patch.dict(os.environ, place), contextlib.ExitStack() as stack:
        stack.enter_context(_daemon(folder, "munged", *_munge_options(folder)))
        stack.enter_context(_daemon(folder, "slurmctld", "-D"))
        for node in ("n1", "n2"):
            stack.enter_context(_daemon(folder, "slurmd", "-D", "-N", node))
        _wait_until_idle(folder)
        stack.callback(_cancel_all)
        yield


@contextlib.contextmanager
def _daemon(folder: Path, *command: str) -> Iterator[None]:
    with (folder / "daemons.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _munge_options(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    folder.chmod(0o755)  # munge wants nobody else to write above its socket
    files = {"key": key, "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
    options = [f"--{name}-file={folder / file}" for name, file in files.items()]
    return ["--foreground", "--force", f"--socket={folder / 'munge.socket'}", *options]


def _wait_until_idle(folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    command = ["sinfo", "--noheader", "--partition=low", "--format=%D %t"]
    while True:
        told = subprocess.run(command, capture_output=True, text=True)
        if told.stdout.split() == ["2", "idle"]:
            return
        if time.monotonic() > deadline:
            logs = [path.read_text()[-1500:] for path in sorted(folder.glob("*.log"))]
            raise RuntimeError("\n".join(["Slurm does not come up", told.stdout, *logs]))
        time.sleep(0.5)


def _cancel_all() -> None:
    """What jobs started would outlive the daemons."""
    subprocess.run(["scancel", f"--user={getpass.getuser()}"], check=True)
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(["squeue", "--noheader"], capture_output=True).stdout:
        if time.monotonic() > deadline:
            raise RuntimeError("jobs that were cancelled do not end")
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
