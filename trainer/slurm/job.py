"""A training run as a Slurm job: its options, its batch script, its submission."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError
from trainer.run_folder import write_whole

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "scripts" / "slurm" / "train.sbatch"
Word = str | int | None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The section `cluster`: see conf/cluster/default.yaml."""

    options: Sequence[str]
    setup: Sequence[str]
    environment: Mapping[str, Word]
    endpoint: str
    srun: Sequence[str]
    python: str | None
    root: str | None
    container: str | None = None  # image in which the ranks run

    def __post_init__(self) -> None:
        for name in self.environment:
            if not name.isidentifier():
                raise ValueError(f"environment names {name!r}; allowed: names of variables")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The keys of conf/slurm.yaml that are not those of the run."""

    nodes: int
    gpus_per_node: int | None
    ranks_per_node: int | None
    cpus_per_node: int | None
    memory: Word
    time: Word
    partition: Word
    account: Word
    qos: Word
    job_name: str | None
    dependency: str | None
    signal_seconds: int
    max_requeues: int
    max_stalls: int
    preflight: bool
    dry_run: bool

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_node", "signal_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in ("max_requeues", "max_stalls"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 or more")

    @property
    def node_ranks(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1


def render(job: Job, cluster: Cluster, *, name: str, run_dir: Path, train: Sequence[str]) -> str:
    """The batch script.

    name: the job's, if job_name does not say; train: the arguments of train.py.
    """
    node_root = shlex.quote(cluster.root or str(ROOT))
    preflight = f"on_ranks preflight {node_root}/scripts/preflight.py strict=true &&\n    "
    words = {
        "options": _lines(f"#SBATCH {x}" for x in _quoted(_options(job, cluster, name, run_dir))),
        "setup": _lines(cluster.setup),
        "environment": _lines(
            f"export {key}={shlex.quote(str(value))}" for key, value in cluster.environment.items()
        ),
        "run_dir": shlex.quote(str(run_dir)),
        "python": shlex.quote(sys.executable),
        "root": shlex.quote(str(ROOT)),
        "max_requeues": str(job.max_requeues),
        "max_stalls": str(job.max_stalls),
        "srun": " ".join(_quoted([*_step_options(job), *cluster.srun])),
        "node_python": shlex.quote(cluster.python or sys.executable),
        "node_root": node_root,
        "node_ranks": str(job.node_ranks),
        "endpoint": '"$host"'.join(x and shlex.quote(x) for x in cluster.endpoint.split("{host}")),
        "preflight_and": preflight if job.preflight else "",
        "train": " \\\n    ".join(_quoted(train)),
    }
    script = re.sub(r"@(\w+)@", lambda match: words[match[1]], TEMPLATE.read_text())
    return re.sub(r"\n{3,}", "\n\n", script)


def submit(script: str, run_dir: Path) -> str:
    """Leaves the script in run_dir and hands it to sbatch; -> the job's id.

    Raises ConfigError with what sbatch has to say against it.
    """
    path = run_dir / "train.sbatch"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, script)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: cannot be written ({error.strerror})") from error
    command = ["sbatch", "--parsable", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            f"sbatch: {error.strerror}; allowed: a machine that submits to Slurm, or dry_run=true"
        ) from error
    if done.returncode:
        raise ConfigError("; ".join(done.stderr.split("\n")).strip("; ") or "sbatch failed")
    return done.stdout.strip().partition(";")[0]


def _options(job: Job, cluster: Cluster, name: str, run_dir: Path) -> list[str]:
    """Of sbatch."""
    values = {
        "job-name": job.job_name or name,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_node,
        "mem": job.memory,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "dependency": job.dependency,
        # To the ranks and not to the batch shell: just as preemption tells them.
        "signal": f"TERM@{job.signal_seconds}",
        "output": run_dir / "%x_%j.log",
    }
    given = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return [*given, *cluster.options]


def _step_options(job: Job) -> list[str]:
    """Of srun, which since Slurm 22.05 takes this one from nobody else."""
    return [] if job.cpus_per_node is None else [f"--cpus-per-task={job.cpus_per_node}"]


def _quoted(words: Sequence[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


def _lines(words: Iterable[str]) -> str:
    return "\n".join(words)
