"""The feature tables of ``bench_online``: written once by real builds, kept in the cache folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs.intervals import BEGINNING, Interval
from spark_fs.offline.tables import FeatureTable
from spark_fs.spec import Column, SourceSpec, ViewSpec
from spark_fs.types import Float64, Int64

DOUBLES = 5
BUCKETS = 8
#: Where the events of all tables begin; they are less than a second apart.
START = datetime(2025, 1, 1, tzinfo=timezone.utc)
END = START + timedelta(days=30)
WHOLE = Interval(BEGINNING, END)
#: What a later build adds.
NEXT_DAY = Interval(END, END + timedelta(days=1))
VIEW = ViewSpec(
    project="bench",
    name="values",
    version=1,
    entities=("key",),
    keys=(Column("key_id", Int64),),
    features=tuple(Column(f"f{n}", Float64) for n in range(DOUBLES)),
    source=SourceSpec("generated", "spark", "event_timestamp"),
)


@dataclass(frozen=True)
class Shape:
    """A table of so many rows: row ``n`` is of key ``n % keys``, and later than the rows before it."""

    rows: int
    keys: int

    @property
    def name(self) -> str:
        """The folder of the table."""
        return f"{self.rows}-rows-{self.keys}-keys"

    def first(self, rows: int) -> Interval:
        """The interval of the first so many rows."""
        return Interval(BEGINNING, START + timedelta(microseconds=rows * self._step_us))

    @property
    def _step_us(self) -> int:
        return int((END - START) / timedelta(microseconds=1)) // self.rows

    def feature_rows(self, spark: SparkSession) -> DataFrame:
        """All rows, as a build takes them."""
        first_us = int(START.timestamp() * 1_000_000)
        return _rows(spark.range(self.rows), F.col("id") % self.keys, F.lit(first_us) + F.col("id") * self._step_us)


def open_table(spark: SparkSession, cache: Path, shape: Shape) -> FeatureTable:
    """The table, written if it is not there, by one build."""
    folder = cache / shape.name
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        table = FeatureTable(spark, str(folder / "table"), VIEW)
        table.create(BUCKETS)
        table.replace(shape.feature_rows(spark), WHOLE, 1)
        (folder / "done").touch()
    return FeatureTable(spark, str(folder / "table"), VIEW)


def changed_copy(table: FeatureTable, folder: Path) -> FeatureTable:
    """A table of the same files, to be changed without changing the one in the cache."""
    shutil.copytree(table.path, folder, copy_function=os.link)
    # Delta writes new files and never into old ones, so that data files may be shared; its log is copied all the same.
    for file in (folder / "_delta_log").iterdir():
        if file.is_file():
            text = file.read_bytes()
            file.unlink()
            file.write_bytes(text)
    return FeatureTable(table.spark, str(folder), table.view)


def add_day(table: FeatureTable, shape: Shape, build: int) -> int:
    """Build the next day: each hundredth key gets a new row. Gives how many."""
    first_us = int(NEXT_DAY.start.timestamp() * 1_000_000)
    keys = table.spark.range(0, shape.keys, 100)
    table.replace(_rows(keys, F.col("id"), F.lit(first_us) + F.col("id")), NEXT_DAY, build)
    return -(-shape.keys // 100)


def _rows(ids: DataFrame, key: F.Column, micros: F.Column) -> DataFrame:
    return ids.select(
        key.alias("key_id"),
        F.timestamp_micros(micros).alias("event_timestamp"),
        F.timestamp_micros(micros).alias("created_timestamp"),
        *(F.rand(n).alias(f"f{n}") for n in range(DOUBLES)),
    )
