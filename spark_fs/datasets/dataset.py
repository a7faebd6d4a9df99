"""A saved version of a dataset as a person has it: read by Spark, or without it; shown in a notebook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from spark_fs.datasets.manifest import SPLIT, Manifest
from spark_fs.errors import InvalidError, did_you_mean
from spark_fs.files import is_empty_folder, write_text

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow
    from pyspark.sql import DataFrame, SparkSession

#: So many rows are taken from a file at a time.
_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Dataset:
    """One saved version of a training dataset, or with ``part`` one part of its split."""

    manifest: Manifest
    spark: SparkSession | None = field(default=None, repr=False)
    part: str | None = None

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """The version of this dataset, from 1."""
        return self.manifest.version

    @property
    def path(self) -> str:
        """The Delta table; this version of the dataset is its version ``manifest.delta_version``."""
        return self.manifest.path

    def __getitem__(self, part: str) -> Dataset:
        """The rows of one part of the split, such as ``dataset["train"]``; InvalidError SFS-518 where there is none."""
        split = self.manifest.split
        if split is None or part not in split.rows:
            what = f"Dataset '{self.manifest.reference}' has no part '{part}'."
            why = "It was saved without a split." if split is None else did_you_mean(part, split.rows)
            raise InvalidError.of("SFS-518", what, why=why)
        return Dataset(self.manifest, self.spark, part)

    def to_spark_df(self) -> DataFrame:
        """The rows, lazily. Needs the Spark session with which the dataset was got."""
        if self.spark is None:
            raise InvalidError.of("SFS-510", "There is no Spark session here.", fix="use to_arrow(), to_df() or to_polars()")
        from spark_fs.offline.tables import read_version

        rows = read_version(self.spark, self.path, self.manifest.committed)
        return rows if self.part is None else rows.where(rows[SPLIT] == self.part)

    def to_arrow(self) -> pyarrow.Table:
        """The rows as an Arrow table, read without Spark (needs the package deltalake); timestamps with time zone UTC."""
        return self._files().to_table(filter=self._filter())

    def to_batches(self, batch_rows: int = _BATCH_ROWS, *, seed: int | None = None) -> Iterator[pyarrow.RecordBatch]:
        """The rows in Arrow batches of at most ``batch_rows``, without Spark, some batches in memory at a time.

        With ``seed`` they come in an order that it decides: files in random order, rows within each batch too.
        """
        import numpy as np
        import pyarrow as pa

        files = self._files()
        if seed is None:
            yield from files.to_batches(batch_size=batch_rows, filter=self._filter())
            return
        random = np.random.default_rng(seed)
        fragments = sorted(files.get_fragments(), key=lambda fragment: fragment.path)
        for place in random.permutation(len(fragments)):
            scanner = fragments[place].to_batches(schema=files.schema, batch_size=batch_rows, filter=self._filter())
            for batch in scanner:
                if batch.num_rows:
                    yield batch.take(pa.array(random.permutation(batch.num_rows)))

    def to_df(self) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, read without Spark."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> polars.DataFrame:
        """The rows as a polars DataFrame, read without Spark."""
        import polars

        rows = polars.read_delta(self.path, version=self.manifest.committed)
        return rows if self.part is None else rows.filter(polars.col(SPLIT) == self.part)

    def export(self, folder: str) -> list[str]:
        """Write the rows as Parquet files, without Spark, and ``manifest.json`` into a new folder; gives their paths.

        The manifest is that of the whole version, also where only one part is written. Raises InvalidError SFS-519 where
        something is there already.
        """
        import pyarrow.dataset as ds

        if not is_empty_folder(folder):
            raise InvalidError.of("SFS-519", f"{folder} is not empty.", why="Nothing was written.", fix="name a new folder")
        written: list[str] = []
        ds.write_dataset(
            self.to_batches(),
            folder,
            schema=self._files().schema,
            format="parquet",
            file_visitor=lambda file: written.append(file.path),
        )
        # Last: a folder with a manifest is whole.
        write_text(f"{folder}/manifest.json", json.dumps(self.manifest.to_json(), indent=2, ensure_ascii=False))
        return [*written, f"{folder}/manifest.json"]

    def _files(self) -> Any:
        """The rows as a dataset of Arrow."""
        from deltalake import DeltaTable

        return DeltaTable(self.path, version=self.manifest.committed).to_pyarrow_dataset()

    def _filter(self) -> Any:
        import pyarrow.compute as pc

        return None if self.part is None else pc.field(SPLIT) == self.part

    def _repr_html_(self) -> str:
        manifest = self.manifest
        rows = "".join(
            f"<tr><td>{escape(c.name)}</td><td>{escape(c.type)}</td><td>{c.role}</td><td>{c.nulls:,}</td></tr>"
            for c in manifest.columns
        )
        parts = ", ".join(f"{escape(name)} {count:,}" for name, count in manifest.split.rows.items()) if manifest.split else ""
        warned = "".join(f"<li>{escape(text)}</li>" for text in manifest.report["warnings"])
        load = f'FeatureStore(".").get_dataset("{self.name}", version={self.version}).to_df()'
        return (
            f"<b>{escape(manifest.reference)}</b>, {manifest.rows:,} rows{f' ({parts})' if parts else ''}, "
            f"checksum {manifest.checksum}{f'<ul>{warned}</ul>' if warned else ''}"
            f"<table><tr><th>column</th><th>type</th><th>role</th><th>nulls</th></tr>{rows}</table><code>{escape(load)}</code>"
        )
