"""Datasets of Hugging Face `datasets`: a hub name, a local folder or file; rows are documents."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets

from trainer.data.source import SLICE_BYTES, Record, Slice, missing_column, text_content
from trainer.errors import ConfigError

# The loader of a single file, by how its name ends.
LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}
if not sys.stderr.isatty():
    datasets.disable_progress_bars()

SHARD_BYTES = 2**26  # what a shard of a stream counts for, whose size nobody knows


@dataclass(frozen=True)
class HubDataset:
    """path: a name on the hub, a folder of data files, one file, or what `save_to_disk` wrote.

    Without `streaming` the dataset is put into the cache of `datasets` and read by rows; with it
    nothing is, and the least that is read at once is a shard, one of its files.
    """

    label: str
    path: str
    subset: str | None
    split: str
    column: str
    streaming: bool

    def __post_init__(self) -> None:
        if self.subset is not None and (self._saved or Path(self.path).is_file()):
            raise ConfigError(f"data.subset={self.subset}: {self.label} has no subsets")

    @property
    def _saved(self) -> bool:
        folder = Path(self.path)
        return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))

    @cached_property
    def _builder(self) -> datasets.DatasetBuilder:
        file = Path(self.path)
        kind = LOADERS.get(file.suffix) if file.is_file() else None
        if kind is not None:
            return self._ask(datasets.load_dataset_builder, kind, data_files=self.path)
        return self._ask(datasets.load_dataset_builder, self.path, self.subset)

    @cached_property
    def _dataset(self) -> Any:
        """datasets.Dataset, or IterableDataset where streaming leaves nothing on disk."""
        if self._saved:
            loaded = self._ask(datasets.load_from_disk, self.path)
            if isinstance(loaded, datasets.DatasetDict):
                if self.split not in loaded:
                    raise self._no_split(loaded)
                loaded = loaded[self.split]
        elif self.streaming:
            loaded = self._ask(self._builder.as_streaming_dataset, split=self.split)
        else:
            self._ask(self._builder.download_and_prepare)
            loaded = self._ask(self._builder.as_dataset, split=self.split)
        names = loaded.column_names
        if names is not None and self.column not in names:
            raise missing_column(self.label, self.path, self.column, names)
        return loaded.select_columns([self.column]) if names is not None else loaded

    def _no_split(self, known: Any) -> ConfigError:
        return ConfigError(f"data.split={self.split}: {self.label} has: {', '.join(known)}")

    def outline(self) -> str:
        """Names, sizes or times of its files, or the revision on the hub, as `datasets` sees it."""
        if self._saved:
            content: list[Any] = [self._dataset._fingerprint]
        else:
            content = [self._builder.config_id, self._builder.hash]
        facts = [self.subset, self.split, self.column, self.streaming, *content]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def key(self) -> str:
        return self.outline()

    def slices(self) -> list[Slice]:
        rows = self._dataset
        if isinstance(rows, datasets.IterableDataset):
            shards = range(rows.num_shards)
            return [Slice(f"{self.path}#{i}", i, i + 1, SHARD_BYTES) for i in shards]
        count, size = len(rows), rows.data.nbytes
        step = max(1, count * SLICE_BYTES // max(1, size))
        starts = range(0, count, step)
        return [Slice(self.path, i, min(i + step, count), size * step // count) for i in starts]

    def read(self, part: Slice) -> Iterator[Record]:
        rows = self._dataset
        if isinstance(rows, datasets.IterableDataset):
            chosen, before = rows.shard(rows.num_shards, part.start), 0
        else:
            chosen, before = rows.select(range(part.start, part.stop)), part.start
        row = 0
        try:
            for record in chosen:
                row += 1
                if self.column not in record:
                    raise missing_column(self.label, part.name, self.column, record)
                where = partial(self._where, part, before + row)
                yield Record(row, text_content(record[self.column], where))
        except ConfigError:
            raise
        except Exception as error:  # whatever reads the files behind it, there is no common base
            raise self._failed(error) from error

    def _where(self, part: Slice, row: int) -> str:
        return f"data.column={self.column}: {part.name}:{row}"

    def _ask(self, function: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except Exception as error:  # of the hub, of files, of their formats: no common base
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ConfigError:
        generation = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if generation else error  # the former says nothing of its own
        return ConfigError(f"{self.label}: {' '.join(str(cause).split())[:300]}")
