"""A spine's Parquet files as Arrow reads them, against what Spark reads: the same values, or left to Spark."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs.key_bytes import can_be_key
from spark_fs.offline.compute import key_residue
from spark_fs.offline.spine_files import MOST_FILES, LargeSpineError, read_plain_files, residues_of
from spark_fs.offline.spine_stats import small_spine

UTC = timezone.utc
MOST = 64 << 20
NOON = datetime(2024, 3, 10, 12, tzinfo=UTC)
INSTANT = pa.timestamp("us", tz="UTC")
COLUMNS = {
    "int": pa.array([1, None, -(2**31)], pa.int32()),
    "long": pa.array([2**63 - 1, -(2**63), None], pa.int64()),
    "short": pa.array([1, 2, None], pa.int16()),
    "text": pa.array(["ä b", None, ""]),
    "bytes": pa.array([b"\x00\xff", b"", None]),
    "flag": pa.array([True, None, False]),
    "day": pa.array([date(1900, 1, 1), None, date(9999, 12, 31)]),
    "at": pa.array([NOON + timedelta(microseconds=1), datetime(1900, 1, 1, 0, 0, 1, tzinfo=UTC), None], INSTANT),
    "double": pa.array([float("nan"), -0.0, None]),
    "float": pa.array([1.5, None, float("inf")], pa.float32()),
    "money": pa.array([Decimal("1.20"), None, Decimal("-9999999.99")], pa.decimal128(9, 2)),
}


def write(folder: Path, table: pa.Table, files: int = 1) -> str:
    """The rows as some Parquet files in a folder."""
    folder.mkdir()
    for number in range(files):
        pq.write_table(table.slice(number * table.num_rows // files, table.num_rows // files), folder / f"{number}.parquet")
    return str(folder)


def as_rows(table: pa.Table) -> list[str]:
    """The rows by their text, in which NaN is NaN, in any order; instants in UTC."""
    zoned = [field.with_type(INSTANT) if getattr(field.type, "tz", None) else field for field in table.schema]
    return sorted(map(repr, table.cast(pa.schema(zoned)).to_pylist()))


@pytest.mark.parametrize("files", [1, 3])
def test_arrow_reads_what_spark_reads(spark: SparkSession, tmp_path: Path, files: int) -> None:
    """Each type, with nulls and extremes, in files of Arrow and of Spark; and each key has the residue that Spark gives it."""
    path = write(tmp_path / "arrow", pa.table(COLUMNS), files)
    spark.read.parquet(path).write.parquet(str(tmp_path / "spark"))
    for place in (path, str(tmp_path / "spark")):
        frame = spark.read.parquet(place)
        found = read_plain_files(frame, MOST)
        assert found is not None
        assert found.column_names == frame.columns
        assert as_rows(found) == as_rows(frame.toArrow())
        keys = [
            ("long",),
            ("text",),
            ("bytes",),
            ("flag",),
            ("day",),
            ("at",),
            ("int", "text"),
            ("at", "day", "long"),
            ("short",),
        ]
        types = dict(frame.dtypes)
        for names in keys:
            assert all(can_be_key(found.schema.field(name).type) for name in names)
            residue = F.coalesce(key_residue([(F.col(name), types[name]) for name in names], 1024), F.lit(-1))
            expected = frame.select(*names, residue.alias("residue")).toArrow()
            mine = found.select(list(names)).append_column("residue", pa.array(residues_of([found[n] for n in names], 1024)))
            assert as_rows(mine.cast(expected.schema)) == as_rows(expected)


def test_a_small_spine_is_the_same_with_and_without_spark(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics, rows and residues; and no job is run for it."""
    rows = pa.table({"id": [n % 70 for n in range(500)], "event_timestamp": pa.array(range(500), INSTANT)})
    frame = spark.read.parquet(write(tmp_path / "spine", rows, 2))
    group = f"spine {tmp_path}"
    spark.sparkContext.setJobGroup(group, group)
    try:
        direct = small_spine(frame, "event_timestamp", [("id",)])
        assert list(spark.sparkContext.statusTracker().getJobIdsForGroup(group)) == []
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", "")
    monkeypatch.setattr("spark_fs.offline.spine_stats.read_plain_files", lambda *_: None)
    fetched = small_spine(frame, "event_timestamp", [("id",)])
    assert direct is not None
    assert fetched is not None
    assert direct.stats == fetched.stats
    assert as_rows(direct.rows) == as_rows(fetched.rows)
    assert sorted(direct.residues["id",]) == sorted(fetched.residues["id",])


def partitioned(spark: SparkSession, place: str) -> DataFrame:
    spark.range(4).selectExpr("id", "id % 2 AS part").write.partitionBy("part").parquet(place)
    return spark.read.parquet(place)


def int96(spark: SparkSession, place: str) -> DataFrame:
    spark.conf.set("spark.sql.parquet.outputTimestampType", "INT96")
    spark.range(4).select(F.timestamp_seconds("id").alias("at")).write.parquet(place)
    spark.conf.set("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")
    return spark.read.parquet(place)


def plain(spark: SparkSession, place: str, sql: str = "*") -> DataFrame:
    spark.range(4).selectExpr("id", "array(id) AS list", "DATE'1899-12-31' AS old").selectExpr(sql).write.parquet(place)
    return spark.read.parquet(place)


def unlike(spark: SparkSession, place: str) -> DataFrame:
    spark.range(4).write.parquet(place)
    spark.range(4).selectExpr("id", "id AS more").write.mode("append").parquet(place)
    return spark.read.schema("id bigint, more bigint").parquet(place)


LEFT_TO_SPARK = {
    "a filter": lambda spark, place: plain(spark, place, "id").where("id > 1"),
    "a computed column": lambda spark, place: plain(spark, place, "id").selectExpr("id + 1 AS id"),
    "fewer columns": lambda spark, place: plain(spark, place).select("id"),
    "a limit": lambda spark, place: plain(spark, place, "id").limit(2),
    "an option": lambda spark, place: plain(spark, place, "id").sparkSession.read.option("mergeSchema", True).parquet(place),
    "another type": lambda spark, place: plain(spark, place, "id").sparkSession.read.schema("id decimal(20,0)").parquet(place),
    "a nested column": lambda spark, place: plain(spark, place, "list"),
    "a day of long ago": lambda spark, place: plain(spark, place, "old"),
    "a partition column": partitioned,
    "instants in INT96": int96,
    "files unlike each other": unlike,
    "no file": lambda spark, _: spark.range(4),
}


@pytest.mark.parametrize("what", LEFT_TO_SPARK)
def test_what_may_differ_is_left_to_spark(spark: SparkSession, tmp_path: Path, what: str) -> None:
    """Anything but whole files with exactly the columns asked for."""
    assert read_plain_files(LEFT_TO_SPARK[what](spark, str(tmp_path / "rows")), MOST) is None


def test_other_formats_and_lost_files_are_left_to_spark(spark: SparkSession, tmp_path: Path) -> None:
    """Delta and CSV; and a file that has gone since the frame was made, of which Spark tells."""
    spark.range(4).write.format("delta").save(str(tmp_path / "delta"))
    spark.range(4).write.csv(str(tmp_path / "csv"), header=True)
    delta = spark.read.format("delta").load(str(tmp_path / "delta"))
    text = spark.read.csv(str(tmp_path / "csv"), header=True)
    assert read_plain_files(delta, MOST) is None
    assert read_plain_files(text, MOST) is None
    gone = plain(spark, str(tmp_path / "rows"), "id")
    for file in (tmp_path / "rows").glob("*.parquet"):
        file.unlink()
    assert read_plain_files(gone, MOST) is None


# ---- bounds


def test_many_files_are_left_to_spark(spark: SparkSession, tmp_path: Path) -> None:
    """Its tasks open them side by side."""
    rows = pa.table({"id": range(MOST_FILES + 1)})
    assert read_plain_files(spark.read.parquet(write(tmp_path / "more", rows, MOST_FILES + 1)), MOST) is None
    found = read_plain_files(spark.read.parquet(write(tmp_path / "as many", rows.slice(1), MOST_FILES)), MOST)
    assert found is not None
    assert sorted(found["id"].to_pylist()) == list(range(1, MOST_FILES + 1))


def test_footers_tell_of_too_many_rows_before_one_is_decoded(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value a million times is a small file and a large column: 16 MB of values, and bits that none is null."""
    rows = pa.table({"id": pa.array(np.zeros(1_000_000, np.int64)), "at": pa.array(np.zeros(1_000_000, np.int64), INSTANT)})
    path = write(tmp_path / "rows", rows, 2)
    assert sum(file.stat().st_size for file in Path(path).iterdir()) < 100_000
    frame = spark.read.parquet(path)
    found = read_plain_files(frame, 17_000_000)
    assert found is not None
    assert found.num_rows == 1_000_000
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_: pytest.fail("a row was decoded"))
    with pytest.raises(LargeSpineError):
        read_plain_files(frame, 15_999_999)


def test_texts_that_grow_when_decoded_are_noticed_in_time(spark: SparkSession, tmp_path: Path) -> None:
    """The footer does not tell how long they are: decoding ends soon after the bound."""
    rows = pa.table({"id": pa.array(["x" * 1_000]).take(pa.array(np.zeros(400_000, np.int64)))})  # 400 MB
    path = write(tmp_path / "rows", rows, 4)
    del rows
    frame = spark.read.parquet(path)
    pool = pa.jemalloc_memory_pool() if "jemalloc" in pa.supported_memory_backends() else pa.system_memory_pool()
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        peak = pool.max_memory() or 0
        with pytest.raises(LargeSpineError):
            read_plain_files(frame, 20_000_000)
        assert (pool.max_memory() or 0) - peak < 60_000_000
    finally:
        pa.set_memory_pool(before)


def test_a_spine_too_large_to_keep_starts_no_job(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not fetched by Spark instead, only to be thrown away."""
    monkeypatch.setattr("spark_fs.offline.spine_stats._SMALL_ARROW_BYTES", 1_000)
    rows = pa.table({"id": range(500), "event_timestamp": pa.array(range(500), INSTANT)})
    frame = spark.read.parquet(write(tmp_path / "spine", rows))
    group = f"large spine {tmp_path}"
    spark.sparkContext.setJobGroup(group, group)
    try:
        assert small_spine(frame, "event_timestamp", [("id",)]) is None
        assert list(spark.sparkContext.statusTracker().getJobIdsForGroup(group)) == []
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", "")


def test_files_of_which_some_have_no_nulls_are_one_table(spark: SparkSession, tmp_path: Path) -> None:
    """A column that may not be null in one file is as good as one that may."""
    (tmp_path / "rows").mkdir()
    for number, nullable in enumerate((True, False)):
        schema = pa.schema([pa.field("id", pa.int64(), nullable=nullable)])
        pq.write_table(pa.table({"id": [number]}, schema), tmp_path / "rows" / f"{number}.parquet")
    found = read_plain_files(spark.read.parquet(str(tmp_path / "rows")), MOST)
    assert found is not None
    assert sorted(found["id"].to_pylist()) == [0, 1]
