"""The sources that `data.source` names, and which keys each of them takes."""

import sysconfig
from pathlib import Path

from trainer.data.jsonl import SUFFIXES as JSONL
from trainer.data.jsonl import JsonLines
from trainer.data.source import FileSource, Source, below, find_files
from trainer.errors import ConfigError

TAKES = {
    "stdlib": (),
    "files": ("path",),
    "jsonl": ("path", "column"),
    "parquet": ("path", "column"),
    "hf": ("path", "subset", "split", "column"),
}
OPTIONAL = ("subset",)


def build_source(
    source: str,
    path: str | None = None,
    *,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> Source:
    """The keywords are keys of conf/data; raises ConfigError naming one that does not fit."""
    if source not in TAKES:
        raise ConfigError(f"data.source={source}: must be {', '.join(TAKES)}")
    given = {"path": path, "column": column, "subset": subset, "split": split}
    for key, value in given.items():
        taken = key in TAKES[source]
        if value is not None and not taken:
            takers = " and ".join(f"data={name}" for name in TAKES if key in TAKES[name])
            raise ConfigError(
                f"data.{key}={value}: data={source} takes none; allowed with {takers}"
            )
        if value is None and taken and key not in OPTIONAL:
            what = "a file or a folder" if key == "path" and source != "hf" else "one"
            raise ConfigError(f"data.{key}=null: data={source} needs {what}")
    if path is None:
        return standard_library()
    if source == "files":
        return FileSource(*find_files(path))
    assert column is not None
    if source == "jsonl":
        return JsonLines(*find_files(path, *JSONL), column=column)
    if source == "parquet":  # these two formats are slow to import and seldom needed
        from trainer.data.parquet import SUFFIXES, ParquetFiles

        return ParquetFiles(*find_files(path, *SUFFIXES), column=column)
    from trainer.data.hugging_face import HubDataset

    assert split is not None
    return HubDataset(
        label=f"data.path={path}",
        path=str(Path(path).expanduser()) if path.startswith("~") else path,
        subset=subset,
        split=split,
        column=column,
        streaming=streaming,
    )


def standard_library() -> FileSource:
    """The source of the standard library of the interpreter in use: real, long documents."""
    root = Path(sysconfig.get_path("stdlib"))
    label = f"data=stdlib ({root})"
    skip = {"site-packages", "dist-packages", "__pycache__"}
    return FileSource(label, root, below(root, label, (".py",), skip))
