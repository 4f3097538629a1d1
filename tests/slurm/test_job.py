"""Submission: what the batch script says and does, and what is refused before it is queued."""

import dataclasses
import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from tests.models.build import compose
from tests.trainer.tiny import overrides
from trainer import main
from trainer.console import close_logging
from trainer.main import CONF, register_groups
from trainer.slurm.job import Job

# sbatch, srun and scontrol, as far as a batch script sees them; calls go to the file `calls`.
STUB = """#!/bin/bash
name=$(basename "$0")
printf '%s\\n' "$name $*" >> "$(dirname "$0")/../calls"
case "$name $1" in
    "sbatch --parsable") [ -e refuse ] && { echo "sbatch: error: no such partition" >&2; exit 1; }
        echo 17 ;;
    "scontrol show") printf 'n1\\nn2\\n' ;;
    srun*) printf '%s' "$OUTCOME" > run/status.json; exit 1 ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with the commands of Slurm on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def submit(slurm, monkeypatch, capfd):
    """Runs submit.py's command in this process; -> exit code, output, lines of errors."""

    def submit(*arguments: str) -> tuple[int, str, list[str]]:
        given = [a for a in overrides(slurm) if not a.startswith("run_dir")]
        flags = [a for a in arguments if a.startswith("--")]
        rest = [a for a in arguments if a not in flags]
        monkeypatch.setattr(sys, "argv", ["submit.py", *flags, *given, "run_dir=run", *rest])
        with pytest.raises(SystemExit) as stop:
            main.command("slurm", main.submit)
        out, err = capfd.readouterr()
        return stop.value.code, out, err.splitlines()

    yield submit
    close_logging()


def calls(slurm: Path) -> list[str]:
    path = slurm / "calls"
    return path.read_text().splitlines() if path.exists() else []


def train_arguments(script: str) -> list[str]:
    start = script.index("scripts/train.py")
    return shlex.split(script[start : script.index("code=$?")])[1:]


def test_a_job_is_rendered_shown_and_submitted(submit, slurm):
    code, out, errors = submit(
        "nodes=2", "gpus_per_node=2", "time=24:00:00", "partition=gpu", "cpus_per_node=8",
        "dependency=singleton", "signal_seconds=120", "trainer.seed=3", "max_stalls=5",
    )  # fmt: skip
    assert (code, errors) == (0, [])
    script = (slurm / "run" / "train.sbatch").read_text()
    assert out == f"{script}\nsubmitted job 17: run\n"
    assert calls(slurm) == ["sbatch --parsable run/train.sbatch"]
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    assert options == [
        "--job-name=run", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=8", "--time=24:00:00",
        "--partition=gpu", "--dependency=singleton", "--signal=TERM@120",
        "--output=run/%x_%j.log", "--ntasks-per-node=1", "--requeue", "--open-mode=append",
    ]  # fmt: skip
    assert "@" not in script.replace("TERM@120", "").replace("{@:2}", "").replace("@ signs", "")
    assert "--wait=120 --cpus-per-task=8 " in script and "--max-stalls 5" in script
    assert "--nproc-per-node=2" in script
    given = train_arguments(script)
    assert "trainer.seed=3" in given and given[-1] == "run_dir='run'"
    assert not [a for a in given if a.startswith(("nodes", "time", "partition", "max_stalls"))]


def test_the_cluster_file_says_what_is_particular(submit):
    code, out, _ = submit(
        "dry_run=true", "cluster=apptainer", "cluster.container=a b.sif",
        "cluster.endpoint='{host}-ib0'", "cluster.setup=[module load cuda]", "preflight=true",
        "+cluster.environment.NCCL_SOCKET_IFNAME=ib 0", 'cluster.options=["--constraint=h100"]',
    )  # fmt: skip
    assert code == 0
    assert "\nmodule load cuda\nexport NCCL_SOCKET_IFNAME='ib 0'\n" in out
    assert "#SBATCH --constraint=h100\n" in out
    assert "apptainer exec --nv" in out and "'a b.sif' \\\n" in out
    assert "/opt/venv/bin/python /longhaul/scripts/launch.py" in out
    assert '--rdzv-endpoint="$host"-ib0:"$port"' in out
    assert "on_ranks preflight /longhaul/scripts/preflight.py strict=true &&\n" in out


def test_all_of_the_training_is_configured_as_in_train_yaml():
    register_groups()
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        job, train = (OmegaConf.to_container(hydra.compose(name)) for name in ("slurm", "train"))
    own = {key.name for key in dataclasses.fields(Job)} | {"cluster"}
    assert job.keys() - train.keys() == own
    assert train == {key: job[key] for key in train}


def test_a_dry_run_leaves_nothing(submit, slurm):
    before = sorted(slurm.iterdir())
    assert submit("dry_run=true")[0] == 0
    assert sorted(p for p in slurm.iterdir() if p.name not in ("cache", "documents")) == before
    assert calls(slurm) == []


def test_a_sweep_is_a_job_for_each_point(submit, slurm):
    code, _, errors = submit("--multirun", "trainer.seed=0,1", "nodes=1")
    assert (code, errors) == (0, [])
    scripts = [Path(call.split()[-1]) for call in calls(slurm)]
    assert len(scripts) == 2 and {p.parent.parent for p in scripts} == {Path("run")}
    for seed, path in enumerate(scripts):
        script = path.read_text()
        given = train_arguments(script)
        assert f"trainer.seed={seed}" in given and given[-1] == f"run_dir={path.parent}"
        assert f"--job-name=run-{path.parent.name}" in script


@pytest.mark.parametrize(
    ("outcome", "requeued"),
    [('{"outcome": "stopped"}', True), ('{"outcome": "done"}', False)],
)
def test_the_batch_script_requeues_by_the_outcome(submit, slurm, monkeypatch, outcome, requeued):
    submit("nodes=2")
    for name, value in {
        "SLURM_JOB_ID": "40017", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_RESTART_COUNT": "3", "OUTCOME": outcome,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    done = subprocess.run(["bash", "run/train.sbatch"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[0] == "attempt 1 of job 40017, from step 0"
    _, hosts, step, *rest = calls(slurm)
    assert hosts == "scontrol show hostnames n[1-2]"
    meeting = "--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=n1:12017"
    assert f"launch.py {meeting} --rdzv-id=40017.3.train " in step
    assert rest == (["scontrol requeue 40017"] if requeued else [])
    lines = (slurm / "run" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["begin", "end"]
    assert json.loads(lines[1])["requeue"] is requeued


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("nodes=0", "nodes is 0; allowed: 1 or more"),
        ("nodez=2", "nodez=2: unknown key; allowed: mixer, "),
        ("cluster=moon", "cluster=moon: unknown choice; allowed: apptainer, default, pyxis"),
        ("trainer.stepz=1", "trainer.stepz=1: unknown key; allowed: trainer.steps, "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(submit, slurm, argument, line):
    code, out, errors = submit(argument)
    assert (code, out) == (2, "")
    assert len(errors) == 1 and errors[0].startswith(f"error: {line}"), errors
    assert calls(slurm) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("time=[1]", "time=[1]: allowed: str or int or null"),
        (
            "cluster=pyxis",
            "MissingMandatoryValue while resolving interpolation: Missing mandatory "
            "value: cluster.container",
        ),
        ("trainer.steps=0", "trainer.steps is 0; allowed: 1 or more"),
        ("nodes=2 trainer.profile.ranks=[2]", "trainer.profile.ranks=[2]: the run has 2; allowed"),
        ("nodes=3 gpus_per_node=2", "data.batch_size=4: must be a multiple of 6 data ranks x "),
        ("nodes=2 parallel=ring parallel.cp=3", "parallel.cp is 3; allowed: a divisor of the"),
        ("nodes=4 parallel=ulysses", "mixer.kda.num_heads=2: 4 ranks share the heads; allowed: "),
        ("model.pattern=[kda,zeta]", "model.pattern names 'zeta'"),
        ("data.seq_len=0", "data.seq_len=0: must be at least 1"),
        ("data.path=/nowhere", "data.path=/nowhere: "),
        ("data.workers=-1", "data.workers=-1: must be at least 0"),
        (
            "nodes=2 data.stages=[{tokens:99},{batch_size:3}]",
            "data.stages[1].batch_size=3: must be a ",
        ),
        ("init_from=/nowhere", "init_from=/nowhere: no weights in /nowhere"),
        ("optim.lr=-1", "optim.lr is -1; allowed: above 0"),
        ("engine.bucket_mb=x", "engine.bucket_mb=x: allowed: finite float"),
        ("ops.softmax=fast", "ops.softmax=fast: unknown choice; allowed: auto, flash, aten, "),
    ],
)
def test_bad_values_are_refused_before_they_are_queued(slurm, capfd, arguments, line):
    """Behind Hydra, which takes most of a second."""
    words = [*overrides(slurm), "run_dir=run", *arguments.split()]
    with pytest.raises(SystemExit) as stop, main.exit_codes("slurm"):
        main.submit(compose(words, "slurm"))
    out, err = capfd.readouterr()
    errors = err.splitlines()
    assert (stop.value.code, out) == (2, "")
    assert len(errors) == 1 and errors[0].startswith(f"error: {line}"), errors
    assert calls(slurm) == []


def test_paths_inside_a_container_are_not_looked_at(submit):
    more = ["cluster=pyxis", "cluster.container=image", "data.path=/nowhere", "dry_run=true"]
    assert submit(*more)[0] == 0


def test_what_sbatch_refuses_is_one_line(submit, slurm):
    (slurm / "refuse").touch()
    code, _, errors = submit()
    assert code == 2 and errors == ["error: sbatch: error: no such partition"]


def test_without_slurm_only_a_dry_run_is_possible(submit, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, errors = submit()
    assert code == 2 and errors[0].startswith("error: sbatch: No such file or directory; allowed: ")
