"""Rows of a feature table → tasks that publish them: which row of each key, in how many tasks, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import and_, or_
from typing import Any

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from spark_fs.intervals import Interval, to_micros
from spark_fs.offline.compute import key_bytes, quoted, within
from spark_fs.offline.layout import DataFile, read_layout
from spark_fs.offline.table_log import Commit, can_be_read_in_place, files_are_sorted
from spark_fs.offline.tables import FeatureTable, observed
from spark_fs.online import compare, executor
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts
from spark_fs.spec import ViewSpec

#: A task takes one bucket where there are fewer than so many, or than so many for each slot.
_LEAST_TASKS, _TASKS_PER_SLOT = 64, 4
#: Bytes of data files for a task, at least and at most. It takes Spark a tenth of a second to run an empty one, and a task that
#: is lost is done again, in some seconds.
_LEAST_BYTES, _MOST_BYTES = 4 << 20, 128 << 20


def within_any(intervals: Sequence[Interval]) -> SparkColumn:
    """True for rows whose event time lies in one of the intervals."""
    return reduce(or_, map(within, intervals))


def files_in_place(table: FeatureTable, version: int, log: Sequence[Commit], interval: Interval) -> tuple[DataFile, ...] | None:
    """The data files with rows of the interval, if each can be read by itself; else None. Starts no job.

    That is where all are known to be sorted and each bucket has one of them, so that no two share a key: the rows of one
    build, or of all after an upkeep. There may be others, with rows outside the interval only. ``log``: the commits up to the
    version, newest first.
    """
    if not log or not (can_be_read_in_place(log) or files_are_sorted(log)):
        return None
    _, layout, _ = read_layout(table.path, version)
    if layout is None:
        return None
    files = layout.touching(interval)
    return files if len({file.bucket for file in files}) == len(files) else None


def publish_files(
    table: FeatureTable,
    files: Sequence[DataFile],
    target: OnlineTarget,
    interval: Interval,
    notes: executor.Notes | None = None,
    done: Sequence[int] = (),
) -> tuple[WriteCounts, int]:
    """Publish data files where they lie: no rows pass through the JVM and none are shuffled. Counts and rows read.

    The files are those of ``files_in_place``; a task takes one or several. Each bucket that is written is
    noted; those in ``done`` are left out.
    """
    left = [file for file in files if file.bucket not in done]
    if not left:
        return WriteCounts(), 0
    start_us, end_us = to_micros(interval.start), to_micros(interval.end)
    named = tuple((file.path, file.bucket) for file in left)
    how: dict[str, Any] = {"files": named, "keys": table.view.keys, "start_us": start_us, "end_us": end_us, "notes": notes}
    tasks = _tasks(left, table.spark.sparkContext.defaultParallelism)
    numbers = table.spark.range(0, len(left), 1, tasks)
    return run_tasks(numbers, partial(executor.publish_files, **how), target, most_tasks=tasks)


def _tasks(files: Sequence[DataFile], slots: int) -> int:
    """In how many tasks to read the files: one for each slot, more where they are large, fewer where they are tiny."""
    size = sum(file.size_bytes for file in files)
    wanted = min(len(files), slots * -(-size // (slots * _MOST_BYTES)) or 1, 1 + size // _LEAST_BYTES)
    # All tasks the same number of files, but for the last.
    return -(-len(files) // -(-len(files) // wanted))


def publish_rows(
    view: ViewSpec, rows: DataFrame, target: OnlineTarget, notes: executor.Notes | None = None, done: Sequence[int] = ()
) -> tuple[WriteCounts, int]:
    """Publish the newest of the rows of each key, through Spark's reader and a shuffle. Counts and rows read.

    Each bucket that is written is noted; rows of those in ``done`` are left out.
    """
    rows = rows.where(~F.col("_bucket").isin(*done)) if done else rows
    read, all_rows = Observation(), [F.count(F.lit(1)).alias("rows")]
    newest = newest_rows(view, rows.observe(read, *all_rows))
    counts, _ = run_tasks(newest, partial(executor.publish_rows, notes=notes), target)
    return counts, int(observed(read, rows, all_rows)["rows"])


def extra_keys(published: DataFrame, target: OnlineTarget) -> DataFrame:
    """``_key`` of each row that is online though it is erased or not in ``published`` (``_key``). One task looks them up."""
    spark = published.sparkSession
    work = partial(compare.stored_keys, target=target)
    stored = spark.range(0, 1, 1, 1).mapInArrow(work, "_key binary, _erased boolean").distinct()
    unknown = stored.where(~F.col("_erased")).join(published.select("_key"), "_key", "left_anti")
    return unknown.unionByName(stored.where("_erased")).select("_key")


def run_tasks(
    frame: DataFrame, work: Callable[..., Iterator[Any]], target: OnlineTarget, *, most_tasks: int | None = None
) -> tuple[WriteCounts, int]:
    """Let the executors do the work; the sums of what they report, which is that of the task attempts that succeeded.

    ``most_tasks``: of how many tasks at most it is known that the frame has them.
    """
    if target.max_rows_per_second:
        # Each task gets the same share, so there must not be more of them than shares, however many cores Spark has or gets.
        cores = frame.sparkSession.sparkContext.defaultParallelism
        tasks = min(cores, most_tasks or cores)
        frame, target = frame.coalesce(tasks), replace(target, max_rows_per_second=target.max_rows_per_second / tasks)
    *summed, least = executor.MEASURES
    # One row for each task, added up here: an aggregate in Spark would cost a stage of its own.
    schema = ", ".join(f"{name} bigint" for name in executor.MEASURES)
    parts = frame.mapInArrow(partial(work, target=target), schema).collect()
    totals = {name: sum(part[name] for part in parts) for name in summed}
    replicas = min((part[least] for part in parts if part[least] is not None), default=None)
    return WriteCounts(**{name: totals[name] for name in COUNTS}, replicas=replicas), totals["rows_read"]


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
    return newest.select(*online_columns(view), *bucket)


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
    return newest.select(*online_columns(view), left, "_lost")


def _rank(keys: Sequence[SparkColumn]) -> SparkColumn:
    """1 for the newest row of each key."""
    newest_first = (F.col("event_timestamp").desc(), F.col("created_timestamp").desc_nulls_last())
    return F.row_number().over(Window.partitionBy(*keys).orderBy(*newest_first))


def online_columns(view: ViewSpec) -> list[SparkColumn]:
    """What is written online of a feature row: ``_key`` (key bytes), event_timestamp, created_timestamp, _build, features."""
    names = ("event_timestamp", "created_timestamp", "_build")
    return [key_bytes(view.keys).alias("_key"), *map(F.col, names), *(quoted(name) for name in view.feature_names)]
