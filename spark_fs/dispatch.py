"""Rows of a feature table → tasks that publish them: which row of each key, in how many tasks, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from operator import and_, or_
from typing import Any

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from spark_fs.files import check_readable
from spark_fs.intervals import Interval, to_micros
from spark_fs.offline.compute import key_bytes, quoted, within
from spark_fs.offline.tables import FeatureTable, bucket_of_file, observed
from spark_fs.online import compare, executor
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts
from spark_fs.spec import ViewSpec

#: A task takes one bucket where there are fewer than so many, or than so many for each slot.
_LEAST_TASKS, _TASKS_PER_SLOT = 64, 4


def within_any(intervals: Sequence[Interval]) -> SparkColumn:
    """True for rows whose event time lies in one of the intervals."""
    return reduce(or_, map(within, intervals))


def opens_without_spark(path: str) -> bool:
    """Whether Python workers can open files at this place."""
    try:
        check_readable(path)
    except (OSError, ValueError, NotImplementedError):
        return False
    return True


def publish_files(
    table: FeatureTable,
    version: int,
    target: OnlineTarget,
    interval: Interval,
    confirmed: Any = None,
    done: Sequence[int] = (),
) -> tuple[WriteCounts, int]:
    """Publish each data file where it lies: no rows pass through the JVM and none are shuffled. Counts and rows read.

    Only for tables of which ``can_be_read_in_place`` is true, at places that can be opened without Spark. ``confirmed`` is
    told each bucket that is written (see ``executor.Confirmed``); those in ``done`` are left out.
    """
    files = [(file, bucket_of_file(file)) for file in table.data_files(version)]
    files = [(file, bucket) for file, bucket in files if bucket not in done]
    if not files:
        return WriteCounts(), 0
    named = table.spark.createDataFrame(files, "file string, _bucket int").repartition(len(files))
    start_us, end_us = to_micros(interval.start), to_micros(interval.end)
    keys = table.view.keys
    work = partial(executor.publish_files, target=target, keys=keys, start_us=start_us, end_us=end_us, confirmed=confirmed)
    return run_tasks(named, work)


def publish_rows(
    view: ViewSpec, rows: DataFrame, target: OnlineTarget, confirmed: Any = None, done: Sequence[int] = ()
) -> tuple[WriteCounts, int]:
    """Publish the newest of the rows of each key, through Spark's reader and a shuffle. Counts and rows read.

    ``confirmed`` is told each bucket that is written (see ``executor.Confirmed``); rows of those in ``done`` are left out.
    """
    rows = rows.where(~F.col("_bucket").isin(*done)) if done else rows
    read, all_rows = Observation(), [F.count(F.lit(1)).alias("rows")]
    newest = newest_rows(view, rows.observe(read, *all_rows))
    counts, _ = run_tasks(newest, partial(executor.publish_rows, target=target, confirmed=confirmed))
    return counts, int(observed(read, rows, all_rows)["rows"])


def extra_keys(published: DataFrame, target: OnlineTarget) -> DataFrame:
    """``_key`` of each row that is online though it is erased or not in ``published`` (``_key``). One task looks them up."""
    spark = published.sparkSession
    work = partial(compare.stored_keys, target=target)
    stored = spark.range(0, 1, 1, 1).mapInArrow(work, "_key binary, _erased boolean").distinct()
    unknown = stored.where(~F.col("_erased")).join(published.select("_key"), "_key", "left_anti")
    return unknown.unionByName(stored.where("_erased")).select("_key")


def run_tasks(frame: DataFrame, work: Callable[..., Iterator[Any]]) -> tuple[WriteCounts, int]:
    """Let the executors do the work; the sums of what they report, which is that of the task attempts that succeeded."""
    *summed, least = executor.MEASURES
    parts = frame.mapInArrow(work, ", ".join(f"{name} bigint" for name in executor.MEASURES))
    sums = (F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in summed)
    totals = parts.agg(*sums, F.min(least).alias(least)).first()
    assert totals is not None  # an aggregate without groups has one row
    return WriteCounts(**{name: totals[name] for name in (*COUNTS, least)}), totals["rows_read"]


def newest_rows(view: ViewSpec, rows: DataFrame) -> DataFrame:
    """One row per key, that with the greatest (event_timestamp, created_timestamp): a feature table has no ties on those.

    Columns: ``_key`` (key bytes), event_timestamp, created_timestamp, _build, features, and ``_bucket`` where ``rows`` have it:
    a bucket is then in one partition, its rows together.
    """
    by, bucket = [quoted(name) for name in view.key_names], []
    if "_bucket" in rows.columns:
        # A key is in one bucket, so that Spark need not shuffle once more for the keys.
        buckets = int(rows.schema["_bucket"].metadata["buckets"])
        tasks = min(buckets, max(_LEAST_TASKS, _TASKS_PER_SLOT * rows.sparkSession.sparkContext.defaultParallelism))
        rows, by, bucket = rows.repartition(tasks, "_bucket"), [F.col("_bucket"), *by], ["_bucket"]
    newest = rows.withColumn("_rank", _rank(by)).where(F.col("_rank") == 1)
    return newest.select(*_online_columns(view), *bucket)


def rows_left(view: ViewSpec, rows: DataFrame, lost: DataFrame) -> DataFrame:
    """For each key of ``lost`` its newest row in ``rows``.

    Columns: ``_key``, event_timestamp, created_timestamp, _build, features; ``_left``: ``none`` where the key has no row, the
    others being null, ``older`` or ``newer`` than the newest that it has lost; ``_lost``: the times of all that it has lost,
    structs of ``event_us`` and ``created_us`` since 1970.
    """
    keys, at = [quoted(name) for name in view.key_names], F.struct("event_timestamp", "created_timestamp")
    micros = (F.unix_micros("event_timestamp").alias("event_us"), F.unix_micros("created_timestamp").alias("created_us"))
    by_key = lost.groupBy(*keys).agg(F.max(at).alias("_lost_at"), F.collect_list(F.struct(*micros)).alias("_lost"))
    renamed = rows.withColumnsRenamed({name: f"_row_key{n}" for n, name in enumerate(view.key_names)})
    met = [quoted(name) == F.col(f"_row_key{n}") for n, name in enumerate(view.key_names)]
    joined = by_key.join(renamed, reduce(and_, met, F.lit(True)), "left")
    newest = joined.withColumn("_rank", _rank(keys)).where(F.col("_rank") == 1)
    is_older = F.when(at < F.col("_lost_at"), "older").otherwise("newer")
    left = F.when(F.col("event_timestamp").isNull(), "none").otherwise(is_older).alias("_left")
    return newest.select(*_online_columns(view), left, "_lost")


def _rank(keys: Sequence[SparkColumn]) -> SparkColumn:
    """1 for the newest row of each key."""
    newest_first = (F.col("event_timestamp").desc(), F.col("created_timestamp").desc_nulls_last())
    return F.row_number().over(Window.partitionBy(*keys).orderBy(*newest_first))


def _online_columns(view: ViewSpec) -> list[SparkColumn]:
    names = ("event_timestamp", "created_timestamp", "_build")
    return [key_bytes(view.keys).alias("_key"), *map(F.col, names), *(quoted(name) for name in view.feature_names)]
