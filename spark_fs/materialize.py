"""Feature tables → online store: the newest row of each key, written in parallel from the executors."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from spark_fs.intervals import Interval, text, to_micros
from spark_fs.offline.compute import key_bytes, within
from spark_fs.offline.tables import FeatureTable, observed
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts, write_partition
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
    began, view, version = time.monotonic(), table.view, table.version()
    wanted = within(interval)
    if since is not None:
        wanted = wanted & _new(table, since, version)
    read, all_rows = Observation(), [F.count(F.lit(1)).alias("rows")]
    rows = table.read(version).where(wanted)
    counts = write_online(newest_rows(view, rows.observe(read, *all_rows)), target)
    return MaterializeResult(
        view=view.reference,
        interval=interval,
        table_version=version,
        rows_read=observed(read, rows, all_rows)["rows"],
        **{name: getattr(counts, name) for name in COUNTS},
        seconds=round(time.monotonic() - began, 3),
    )


def _new(table: FeatureTable, since: Watermark, version: int) -> SparkColumn:
    past_the_end = F.col("event_timestamp") >= F.timestamp_micros(F.lit(to_micros(since.end)))
    builds = table.builds_since(since.table_version, version)
    return F.lit(True) if builds is None else F.col("_build").isin(sorted(builds)) | past_the_end


def newest_rows(view: ViewSpec, rows: DataFrame) -> DataFrame:
    """One row per key, that with the greatest (event_timestamp, created_timestamp): a feature table has no ties on those.

    Columns: ``_key`` (key bytes), event_timestamp, created_timestamp, _build, features.
    """
    keys = [F.col(f"`{name}`") for name in view.key_names]
    newest_first = Window.partitionBy("_bucket", *keys).orderBy(
        F.col("event_timestamp").desc(), F.col("created_timestamp").desc_nulls_last()
    )
    newest = rows.withColumn("_rank", F.row_number().over(newest_first)).where(F.col("_rank") == 1)
    features = [F.col(f"`{name}`") for name in view.feature_names]
    return newest.select(key_bytes(view.keys).alias("_key"), "event_timestamp", "created_timestamp", "_build", *features)


def write_online(rows: DataFrame, target: OnlineTarget) -> WriteCounts:
    """Write the rows (columns as ``newest_rows`` gives them) from the executors; sums what the server replied.

    Counts are those of the task attempts that succeeded: a retried task finds its rows equal.
    """
    schema = ", ".join(f"{name} bigint" for name in COUNTS)
    parts = rows.mapInArrow(partial(write_partition, target=target), schema)
    totals = parts.agg(*(F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in COUNTS)).first()
    assert totals is not None  # an aggregate without groups has one row
    return WriteCounts(**totals.asDict())
