"""Parquet: a row's text column is a document. A row group is the least that is read at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.source import Files, Record, Slice, missing_column, unreadable
from trainer.errors import ConfigError

SUFFIXES = (".parquet",)
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ParquetFiles(Files):
    column: str

    @property
    def read_as(self) -> tuple[str, ...]:
        return "parquet", self.column

    def slices(self) -> list[Slice]:
        """A row group each, sized as its text is uncompressed."""
        cut = []
        for name in self.names:
            with self._open(name) as file:
                names = file.schema_arrow.names
                if self.column not in names:
                    raise missing_column(self.label, name, self.column, names)
                groups = map(file.metadata.row_group, range(file.num_row_groups))
                cut += [Slice(name, i, i + 1, self._size(g)) for i, g in enumerate(groups)]
        return cut

    def read(self, part: Slice) -> Iterator[Record]:
        with self._open(part.name) as file:
            groups = range(part.start, part.stop)
            row = 0
            try:
                batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[self.column])
                for batch in batches:
                    for value in self._as_bytes(batch.column(0), part.name):
                        row += 1
                        yield Record(row, value.as_py() or b"")
            except (pa.ArrowException, OSError) as error:
                raise self._damaged(part.name, error) from error

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            # Unbuffered, a column chunk would be held whole, however large its row group is.
            return pq.ParquetFile(self.root / name, buffer_size=2**20)
        except pa.ArrowException as error:
            raise self._damaged(name, error) from error
        except OSError as error:
            raise unreadable(self.label, error, self.root / name) from error

    def _size(self, group: pq.RowGroupMetaData) -> int:
        columns = map(group.column, range(group.num_columns))
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.column)

    def _as_bytes(self, values: pa.Array, name: str) -> pa.Array:
        """Text as it is stored, valid UTF-8 or not."""
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        kind = values.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return values.cast(pa.binary() if pa.types.is_string(kind) else pa.large_binary())
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return values
        raise ConfigError(f"data.column={self.column}: {name} is not text but {kind}")

    def _damaged(self, name: str, error: Exception) -> ConfigError:
        reason = str(error).splitlines()[0]
        return ConfigError(f"{self.label}: {self.root / name} is damaged or no Parquet: {reason}")
