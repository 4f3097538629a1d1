"""The commands: compose a configuration, do the job, and end with an exit code that says how.

0 done; 1 the run failed; 2 bad configuration, with one line on standard error; 75 stopped by a
signal, behind a complete checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel import mesh as meshes
from parallel.collectives import LostRankError
from trainer.auto_parallel import resolve_parallel
from trainer.build import build_mesh, build_trainer
from trainer.check import check_run
from trainer.checkpoint.convert import convert as write_weights
from trainer.checkpoint.weights import open_weights
from trainer.console import configure_logging, log, log_to_file
from trainer.construct import call
from trainer.errors import ConfigError, TrainingError
from trainer.evaluate import run_task, take_over, trained_with
from trainer.generation import write_text
from trainer.load import take_model
from trainer.prepare_data import prepare_or_inspect
from trainer.routing_map import write_map
from trainer.run_folder import session, write_whole
from trainer.sensitivity import measure
from trainer.settings import Settings, Start
from trainer.signals import EXIT_STOPPED, StopSignals, end_with_launcher
from trainer.slurm import job as slurm
from trainer.train_tokenizer import write_tokenizer
from trainer.upcycle import upcycle

CONF = Path(__file__).resolve().parent.parent / "conf"
FLAGS = {"--inspect": "inspect=true"}  # a word for what is a key like any other
TAKEN = "model=init_from takes both sections as they are"


def command(config_name: str, job: Callable[[dict[str, Any]], object]) -> None:
    """Runs `job` on conf/<config_name>.yaml with the command line's changes; ends the process."""
    end_with_launcher()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing and exiting with 1
    register_groups()
    words = [verbatim(FLAGS.get(argument, argument)) for argument in sys.argv[1:]]
    sys.argv[1:] = sorted(words, key=is_change)  # argparse takes those in one run only

    @hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)
    def run(config: DictConfig) -> None:
        # Errors leave as exit codes, since Hydra adds lines of its own to exceptions.
        with exit_codes(config_name):
            job(plain(config))

    code: Any = 0
    try:
        with exit_codes(config_name):
            check_choices(sys.argv[1:])
            run()
    except SystemExit as stop:
        code = stop.code
    if "RANK" in os.environ:
        # The threads of a process group can abort a process that Python winds up, all work done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def register_groups() -> None:
    """Makes `mixers` and `all_tasks` of train.yaml: every file of conf/mixer, at mixer.<name>, and
    every file of conf/tasks, at tasks.<name>."""
    for group, made in (("mixer", "mixers"), ("tasks", "all_tasks")):
        names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        defaults = [{f"{group}@{group}.{name}": name} for name in names]
        ConfigStore.instance().store(name=made, node={"defaults": defaults})


def is_change(word: str) -> bool:
    """Whether a word of the command line is key=value or ~key, and no flag or a flag's value."""
    return word.startswith("~") or ("=" in word and not word.startswith("-"))


def verbatim(argument: str) -> str:
    """`prompt=TEXT` and `key=~/PATH` quoted, for Hydra would strip blanks, read numbers, and refuse
    most code and every ~."""
    key, _, text = argument.partition("=")
    if key == "prompt":
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    elif not re.fullmatch("~/[^,]*", text):  # commas are a sweep's
        return argument
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def quoted(path: str) -> str:
    """A path as the value of an override, which Hydra reads as nothing else."""
    harmless = "/" in path and re.fullmatch(r"[\w./-]+", path)
    return path if harmless else QuotedString(path, Quote.single).with_quotes()


def check_choices(arguments: list[str]) -> None:
    """Raises ConfigError for `engine=null`, `eval=0` and the like, which are no names of choices.

    Hydra's own error would name no key, and `engine=[]` would leave the section out.
    """
    for argument, value in choices(arguments):
        if value is None or isinstance(value, bool | int | float | list):
            key = argument.partition("=")[0]
            allowed = ", ".join(sorted(path.stem for path in (CONF / key).glob("*.yaml")))
            raise ConfigError(f"{argument}: unknown choice; allowed: {allowed}")


def choices(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    """The arguments that choose a file of a group, each with the value that Hydra reads."""
    for argument in arguments:
        key = argument.partition("=")[0]
        if key.isidentifier() and (CONF / key).is_dir():
            yield argument, OverridesParser.create().parse_override(argument).value()


@contextlib.contextmanager
def exit_codes(config_name: str) -> Iterator[None]:
    """Turns what a user can put right, and what ended the run, into one line and an exit code."""
    try:
        yield
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a machine: files can be missing
            print(f"error: {explain(error, config_name)}", file=sys.stderr)
        raise SystemExit(2) from error
    except TrainingError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except LostRankError as error:  # one line a rank: that which tells the cause may be any
        print(f"error: rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        if not meshes.joined():
            raise
        traceback.print_exc()  # Hydra would go on to the next job, and meet nobody there
        raise SystemExit(1) from error


def job_folder() -> str:
    """A name for this job of a sweep: a repeated sweep finds its jobs, another one does not."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    job = HydraConfig.get().job
    return f"{job.num}_{hashlib.sha256(job.override_dirname.encode()).hexdigest()[:8]}"


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as resolved dicts and lists; raises OmegaConf's errors.

    What starts with ~/ is a path in the user's home, but for `prompt`, which is text.
    """
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {
        str(key): value if key == "prompt" else expand_home(value)
        for key, value in resolved.items()
    }


def expand_home(value: Any) -> Any:
    """Of a configuration, in every value."""
    if isinstance(value, dict):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    is_path = isinstance(value, str) and value.startswith("~/")
    return str(Path(value).expanduser()) if is_path else value


def train(config: dict[str, Any]) -> None:
    """One run, from nothing or from its last checkpoint, to its last step.

    Raises SystemExit where a signal ended it before that, and behind a job of a sweep during which
    one came, as no other is to follow.
    """
    config = with_model(config)
    run_dir = choose_run_dir(config)
    config["run_dir"] = str(run_dir)
    settings: Settings = call(Settings, config["trainer"], "trainer")
    config["parallel"], reasons = resolve_parallel(config)
    mesh = build_mesh(config["parallel"])
    configure_logging(main=mesh.main)
    with (
        StopSignals() as signals,
        meshes.membership(
            mesh,
            lost_seconds=settings.lost_rank_seconds,
            hang_seconds=settings.hang_seconds,
            folder=run_dir,
        ) as watchdog,
        session(run_dir, mesh, watchdog) as status,
    ):
        if mesh.main:
            log_to_file(run_dir / "train.log")
        if status.left:
            log.warning(status.left)
        for reason in reasons:
            log.info("auto    %s", reason)
        trainer = build_trainer(config, mesh=mesh, run_dir=run_dir)
        trainer.signals, trainer.beat = signals, watchdog.beat
        if mesh.main:
            write_whole(run_dir / "config.yaml", trainer.config)
        if trainer.run() is None and trainer.step >= trainer.steps:
            log.info("nothing to do: trainer.steps=%d is reached", trainer.steps)
        early = trainer.step < trainer.steps
        status.ends(step=trainer.step)
        if early:
            status.ends(outcome="stopped", signal=trainer.stopped_by)
    if early or (trainer.stopped_by is not None and job_folder()):
        raise SystemExit(EXIT_STOPPED)


def with_model(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the model of init_from, if that is the choice, whoever made it.

    Raises ConfigError where the command line changes such a model.
    """
    words: list[str] = []
    if HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        words = hydra_config.overrides.task
        if hydra_config.runtime.choices.get("model") == "init_from":
            for word in filter(changes_model, words):
                raise ConfigError(f"{word}: {TAKEN}")
    given = {override.partition("=")[0] for override in words}
    named = config["data"]["source"] == "store" or "data.tokenizer" in given
    return take_model(config, tokenizer_given=named)


def changes_model(override: str) -> bool:
    """Whether it sets what is in the sections `model` and `mixer`."""
    return override.lstrip("+~").startswith(("model.", "mixer"))


def choose_run_dir(config: dict[str, Any]) -> Path:
    """The key run_dir, or runs/<model name>; a job of a sweep has a folder below it."""
    start: Start = call(Start, {key: config[key] for key in ("run_dir", "resume", "init_from")}, "")
    return Path(start.run_dir or Path("runs", str(config["model"]["name"])), job_folder())


def submit(config: dict[str, Any]) -> None:
    """Prints the batch script of a run, checked as far as it can be, and hands it to Slurm."""
    own = [key.name for key in dataclasses.fields(slurm.Job)]
    job: slurm.Job = call(slurm.Job, {key: config.pop(key) for key in own}, "")
    cluster: slurm.Cluster = call(slurm.Cluster, config.pop("cluster"), "cluster")
    config = with_model(config)
    run_dir = choose_run_dir(config)
    check_run(config, nodes=job.nodes, node_ranks=job.node_ranks, files=cluster.container is None)
    kept_here = {*own, "cluster", "run_dir"}
    given = HydraConfig.get().overrides.task
    train = [x for x in given if re.split(r"[.=@]", x.lstrip("+~"))[0] not in kept_here]
    train.append(f"run_dir={quoted(str(run_dir))}")
    name = "-".join(run_dir.parts[-2:] if job_folder() else run_dir.parts[-1:])
    script = slurm.render(job, cluster, name=name, run_dir=run_dir, train=train)
    print(script)
    if not job.dry_run:
        print(f"submitted job {slurm.submit(script, run_dir)}: {run_dir}")


def evaluate(config: dict[str, Any]) -> None:
    """Prints a task's figures as one JSON object, the last line of standard output."""
    sections = open_weights(Path(config["checkpoint"])).config
    config["parallel"], reasons = resolve_parallel(config | sections)
    mesh = build_mesh(config["parallel"])
    configure_logging(main=mesh.main, stream=sys.stderr)
    for reason in reasons:
        log.info("auto    %s", reason)
    given = [override.partition("=")[0] for override in HydraConfig.get().overrides.task]
    run = trained_with(str(config["checkpoint"]))
    for section in ("data", "tasks"):
        if section not in given:
            config[section] = take_over(section, config[section], run.get(section, {}), given)
    split = config["split"] or ("all" if "data" in given else "eval")
    with meshes.membership(mesh):
        figures = call(run_task, config | {"split": split}, "", mesh=mesh)
        if mesh.main:
            print(json.dumps(figures))


def generate(config: dict[str, Any]) -> None:
    """Prints the prompt and what the model writes behind it, as it is written."""
    for text in call(write_text, config, ""):
        print(text, end="", flush=True)
    print()


def inspect_routing(config: dict[str, Any]) -> None:
    """Writes a map of a text's chunks, and prints the share that every head keeps."""
    for line in call(write_map, config, ""):
        print(line)


def convert(config: dict[str, Any]) -> None:
    """Prints the folder that was written."""
    recipe, data = config.pop("recipe", None), config.pop("data")
    config.pop("tasks")  # which data=task refers to
    if recipe is None:
        print(call(write_weights, config, ""))
        return
    if config.pop("format") not in (None, "native"):
        raise ConfigError("format=hf: recipes write native folders; allowed: native, or null")
    configure_logging(main=True, stream=sys.stderr)
    print(call(upcycle, config | {"recipe": recipe, "data": data}, ""))


def prepare_data(config: dict[str, Any]) -> None:
    """Writes a token store, or prints what one holds."""
    configure_logging(main=True)
    for line in call(prepare_or_inspect, config, ""):
        print(line)


def select_layers(config: dict[str, Any]) -> None:
    """Prints the layers that were chosen, as a list of the command line."""
    configure_logging(main=True, stream=sys.stderr)
    layers = call(measure, config, "")
    print(f"[{','.join(map(str, layers))}]")


def train_tokenizer(config: dict[str, Any]) -> None:
    """Prints the folder that was written."""
    configure_logging(main=True)
    print(call(write_tokenizer, config, ""))


def preset(config_name: str, model: str) -> dict[str, Any]:
    """This command line's configuration with another model, in that model's own pattern."""
    given = HydraConfig.get().overrides.task
    kept = [o for o in given if not o.startswith(("model=", "model.pattern="))]
    return plain(hydra.compose(config_name, [*kept, f"model={model}"]))


def explain(error: Exception, config_name: str) -> str:
    """One line: the key, its value, what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: unknown choice; allowed: {', '.join(error.options or ())}"
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0]
        return f"{error.override!r}: not understood ({reason}); allowed: key=value"
    lines = [line.strip() for line in str(error).splitlines() if "object_type" not in line]
    if lines and lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        value = next((a.partition("=")[2] for a in sys.argv if a.startswith(f"{key}=")), "")
        config = chosen(config_name)
        if config.get("model") == "init_from" and changes_model(key):
            return f"{key}={value}: {TAKEN}"
        allowed = ", ".join(siblings(key, config)) or "see --help"
        return f"{key}={value}: unknown key; allowed: {allowed}"
    return "; ".join(lines)


def chosen(config_name: str) -> dict[str, Any]:
    """The configuration of this command line's choices, with no value changed."""
    words = [word for word, value in choices(sys.argv[1:]) if isinstance(value, str)]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        config = OmegaConf.to_container(hydra.compose(config_name, words))
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def siblings(key: str, config: dict[str, Any]) -> list[str]:
    """The keys beside `key`, or beside the nearest of its parents that exists."""
    section, path = config, ""
    for name in key.split(".")[:-1]:
        if not isinstance(section.get(name), dict):
            break
        section, path = section[name], f"{path}{name}."
    return [path + name for name in section if not name.startswith("_")]
