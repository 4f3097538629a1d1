"""The sources of the section `data`: the one that it describes itself, or those of a mixture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.construct import call, construct
from trainer.data.corpus import Corpus
from trainer.data.opening import locate, open_documents
from trainer.data.plan import LongDocuments, Overlong, Packing
from trainer.data.prepare import Way
from trainer.data.task_rows import ExampleTask, TaskCorpus
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError

# Of a source, beside `source` and `weight`; the section `data` has them for those that do not.
SOURCE_KEYS = (
    "path",
    "column",
    "subset",
    "split",
    "task",
    "options",
    "eval_fraction",
    "packing",
    "overlong",
    "long_documents",
)


def source_sections(
    source: str, sources: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """(the keys of each source by name, its weight); the only one outside a mixture has no name.

    own: the keys of a source in the section `data`, which stand in for those that a source of the
    mixture leaves out. Raises ConfigError naming the key that is wrong.
    """
    if source != "mixture":
        if sources is not None:
            raise ConfigError(f"data.sources={list(sources)}: data=mixture takes sources")
        _check_fraction("data", own["eval_fraction"])
        return {"": {**own, "source": source}}, {"": 1.0}
    if own["path"] is not None:
        raise ConfigError(f"data.path={own['path']}: data=mixture takes data.sources.<name>.path")
    if not sources:
        raise ConfigError(
            "data.sources=null: data=mixture needs {name: {source: ..., weight: ...}}"
        )
    sections, weights = {}, {}
    for name, keys in sources.items():
        path = section_path(name)
        if not isinstance(keys, Mapping) or not str(name).isidentifier():
            raise ConfigError(f"{path}={keys}: allowed: a name and a section for each source")
        weight = keys.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise ConfigError(f"{path}.weight={weight}: must be a number, at least 0")
        weights[name] = float(weight)
        sections[name] = {**own, **{key: x for key, x in keys.items() if key != "weight"}}
        _check_fraction(path, sections[name]["eval_fraction"])
    return sections, weights


def _check_fraction(path: str, held_out: object) -> None:
    """What is no number is found by the constructor."""
    if isinstance(held_out, int | float) and not 0 <= held_out < 1:
        raise ConfigError(f"{path}.eval_fraction={held_out}: must be in [0, 1)")


def section_path(name: str) -> str:
    """Where the keys of a source are."""
    return f"data.sources.{name}" if name else "data"


def build_corpus(
    *,
    source: str,
    path: str | None,
    column: str | None,
    subset: str | None,
    split: str | None,
    task: str | None,
    options: Mapping[str, Any] | None,
    eval_fraction: float,
    packing: Packing,
    overlong: Overlong,
    long_documents: Mapping[str, Any],
    name: str,
    tokenizer: Tokenizer,
    seed: int,
    cache_dir: Path,
    way: Way,
) -> Corpus:
    """Tokenizes on first use; `name` is that of the source in a mixture."""
    key = section_path(name)
    policy: LongDocuments = call(LongDocuments, long_documents, f"{key}.long_documents")
    try:
        place = locate(source=source, path=path, column=column, subset=subset, split=split)
        store = open_documents(place, tokenizer=tokenizer, cache_dir=cache_dir, way=way)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}" if name else str(error)) from error
    keywords: dict[str, Any] = {
        "store": store,
        "seed": seed,
        "eval_fraction": eval_fraction,
        "packing": packing,
        "overlong": overlong,
        "long_documents": policy,
        "key": key,
    }
    if task is None:
        return Corpus(**keywords)
    return TaskCorpus(task=build_example_task(task, options, key), tokenizer=tokenizer, **keywords)


def build_example_task(task: str, options: Mapping[str, Any] | None, key: str) -> ExampleTask:
    """What makes training rows in place of documents; options: the section `tasks.<task>`."""
    if options is None:
        raise ConfigError(f"{key}.task={task}: allowed: null; data=task takes one")
    made = construct(options, f"tasks.{task}")
    if not isinstance(made, ExampleTask):
        raise ConfigError(f"{key}.task={task}: has no examples; allowed: copy, kv, mqar, niah")
    return made
