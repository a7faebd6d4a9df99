"""Feature tables → online store: the newest row of each key, written in parallel from the executors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from spark_fs.files import check_readable
from spark_fs.intervals import Interval, text, to_micros
from spark_fs.offline.compute import instant_literal, key_bytes, quoted, within
from spark_fs.offline.table_log import builds_since, can_be_read_in_place
from spark_fs.offline.tables import FeatureTable, observed
from spark_fs.online import executor
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts
from spark_fs.registry import Watermark
from spark_fs.spec import ViewSpec


@dataclass(frozen=True, slots=True)
class MaterializeResult:
    """What one run did for one view.

    ``rows_read`` rows of the feature table gave one row per key; of those ``applied`` were written, ``equal`` were there
    already, ``stale`` were older than what was there, ``expired`` were past their ttl. ``bytes`` went to the server.
    """

    view: str
    interval: Interval
    table_version: int
    rows_read: int
    applied: int
    equal: int
    stale: int
    expired: int
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "interval": [text(self.interval.start), text(self.interval.end)]}


def materialize_view(
    table: FeatureTable, target: OnlineTarget, interval: Interval, since: Watermark | None = None
) -> MaterializeResult:
    """Write the newest row of each key in the interval; with ``since`` only what is new against it. Runs one Spark job.

    New is what a later build wrote, however old its event time, and what lay past the end of the last run. The guarded
    write keeps what is newer online, so the same run can be repeated, overlap others, and be interrupted at any point.
    """
    began, log = time.monotonic(), table.commits()
    version = log[0].version
    if since is None and can_be_read_in_place(log) and _opens_without_spark(table.path):
        counts, rows_read = publish_files(table, version, target, interval)
    else:
        rows = table.read(version).where(within(interval))
        if since is not None:
            rows = rows.where(_new(builds_since(log, since.table_version), since))
        counts, rows_read = publish_rows(table.view, rows, target)
    return MaterializeResult(
        view=table.view.reference,
        interval=interval,
        table_version=version,
        rows_read=rows_read,
        **{name: getattr(counts, name) for name in COUNTS},
        seconds=round(time.monotonic() - began, 3),
    )


def _new(builds: set[int] | None, since: Watermark) -> SparkColumn:
    past_the_end = F.col("event_timestamp") >= instant_literal(since.end)
    return F.lit(True) if builds is None else F.col("_build").isin(sorted(builds)) | past_the_end


def _opens_without_spark(path: str) -> bool:
    try:
        check_readable(path)
    except (OSError, ValueError, NotImplementedError):
        return False
    return True


def publish_files(table: FeatureTable, version: int, target: OnlineTarget, interval: Interval) -> tuple[WriteCounts, int]:
    """Publish each data file where it lies: no rows pass through the JVM and none are shuffled. Counts and rows read.

    Only for tables of which ``can_be_read_in_place`` is true, at places that can be opened without Spark.
    """
    files = table.data_files(version)
    if not files:
        return WriteCounts(), 0
    named = table.spark.createDataFrame([(file,) for file in files], "file string").repartition(len(files))
    start_us, end_us = to_micros(interval.start), to_micros(interval.end)
    keys = table.view.keys
    work = partial(executor.publish_files, target=target, keys=keys, start_us=start_us, end_us=end_us)
    return _run(named, work)


def publish_rows(view: ViewSpec, rows: DataFrame, target: OnlineTarget) -> tuple[WriteCounts, int]:
    """Publish the newest of the rows of each key, through Spark's reader and a shuffle. Counts and rows read."""
    read, all_rows = Observation(), [F.count(F.lit(1)).alias("rows")]
    newest = newest_rows(view, rows.observe(read, *all_rows))
    counts, _ = _run(newest, partial(executor.publish_rows, target=target))
    return counts, int(observed(read, rows, all_rows)["rows"])


def _run(frame: DataFrame, work: Callable[..., Iterator[Any]]) -> tuple[WriteCounts, int]:
    """Let the executors do the work; the sums of what they report, which is that of the task attempts that succeeded."""
    measures = executor.MEASURES
    parts = frame.mapInArrow(work, ", ".join(f"{name} bigint" for name in measures))
    totals = parts.agg(*(F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in measures)).first()
    assert totals is not None  # an aggregate without groups has one row
    return WriteCounts(**{name: totals[name] for name in COUNTS}), totals["rows_read"]


def newest_rows(view: ViewSpec, rows: DataFrame) -> DataFrame:
    """One row per key, that with the greatest (event_timestamp, created_timestamp): a feature table has no ties on those.

    Columns: ``_key`` (key bytes), event_timestamp, created_timestamp, _build, features.
    """
    keys = [quoted(name) for name in view.key_names]
    newest_first = Window.partitionBy("_bucket", *keys).orderBy(
        F.col("event_timestamp").desc(), F.col("created_timestamp").desc_nulls_last()
    )
    newest = rows.withColumn("_rank", F.row_number().over(newest_first)).where(F.col("_rank") == 1)
    features = [quoted(name) for name in view.feature_names]
    return newest.select(key_bytes(view.keys).alias("_key"), "event_timestamp", "created_timestamp", "_build", *features)
