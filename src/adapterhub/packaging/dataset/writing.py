"""A split's rows as parquet files, written through the datasets library a row group at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adapterhub.packaging.splits import Split

if TYPE_CHECKING:
    import pyarrow

ROW_GROUP_BYTES: Final = 32 << 20
"""Of a row group in memory, before compression."""
SHARD_BYTES: Final = 512 << 20
"""Of a file in memory, before compression."""


class SplitWriter:
    """Writes ``train-00000-of-00002.parquet`` and so on into a folder."""

    def __init__(self, folder: Path, split: Split, schema: pyarrow.Schema) -> None:
        self._folder = folder
        self._split = split
        self._schema = schema
        self._waiting: list[pyarrow.Table] = []
        self._waiting_bytes = 0
        self._shards: list[Path] = []
        self._shard_bytes = 0
        self._writer: Any = None

    def add(self, table: pyarrow.Table) -> None:
        """The next rows, in the writer's schema."""
        self._waiting.append(table)
        self._waiting_bytes += table.nbytes
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            self._write_row_group()

    def finish(self) -> list[Path]:
        """Write what is left -> the files under their final names."""
        if self._waiting:
            self._write_row_group()
        self._end_shard()
        count = len(self._shards)
        return [
            shard.rename(self._folder / f"{self._split}-{number:05d}-of-{count:05d}.parquet")
            for number, shard in enumerate(self._shards)
        ]

    def _write_row_group(self) -> None:
        import pyarrow

        table = pyarrow.concat_tables(self._waiting)
        if self._writer is None:
            self._begin_shard()
        self._writer.write_table(table, writer_batch_size=table.num_rows)
        self._shard_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0
        if self._shard_bytes >= SHARD_BYTES:
            self._end_shard()

    def _begin_shard(self) -> None:
        from datasets import Features
        from datasets.arrow_writer import ParquetWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._shards.append(self._folder / f"{self._split}-{len(self._shards):05d}.parquet")
        self._writer = ParquetWriter(
            features=Features.from_arrow_schema(self._schema), path=str(self._shards[-1])
        )

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.finalize()
        self._writer, self._shard_bytes = None, 0
