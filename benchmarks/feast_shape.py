"""The as-of join in the shape that Feast's Spark offline store renders, as the baseline of bench_asof.py.

Our own writing of that plan. For each view: distinct spine rows; inner join on the keys with
a range predicate on time; GROUP BY row and event time for the greatest created time; ROW_NUMBER per row; re-join of
the values; at the end a left join of every view's result to the spine by row id. The row id here is a hash of typed
columns, which is cheaper than Feast's concatenated text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F


def feast_shaped_join(
    spine: DataFrame,
    views: Mapping[str, DataFrame],
    key: str,
    features: Mapping[str, Sequence[str]],
    ttls: Mapping[str, timedelta | None],
) -> DataFrame:
    """The spine with the features of all views; ``ttls`` has the ttl of each.

    Views have ``key``, ``event_timestamp`` and ``created_timestamp``. Like the original it looks at the spine's time range
    first, which is one Spark job.
    """
    bounds = spine.agg(
        F.unix_micros(F.min("event_timestamp")).alias("first"), F.unix_micros(F.max("event_timestamp")).alias("last")
    ).first()
    assert bounds is not None
    numbered = spine.withColumn("row_id", F.xxhash64(key, "event_timestamp"))
    joined = numbered
    for name, frame in views.items():
        ttl = ttls[name]
        ttl_micros = ttl // timedelta(microseconds=1) if ttl else None
        in_range = frame.where(F.unix_micros("event_timestamp") <= bounds["last"])
        if ttl_micros is not None:
            in_range = in_range.where(F.unix_micros("event_timestamp") >= bounds["first"] - ttl_micros)
        # From the spine itself, not from what is joined so far: no view's join may be computed twice.
        cleaned = _cleaned(numbered.select("row_id", key, "event_timestamp"), in_range, key, features[name], ttl_micros)
        joined = joined.join(cleaned, "row_id", "left")
    return joined.drop("row_id")


def _cleaned(spine: DataFrame, frame: DataFrame, key: str, features: Sequence[str], ttl_micros: int | None) -> DataFrame:
    entities = spine.withColumnRenamed("event_timestamp", "entity_timestamp").distinct()
    age = F.unix_micros("entity_timestamp") - F.unix_micros("event_timestamp")
    visible = (age >= 0) if ttl_micros is None else (age >= 0) & (age <= ttl_micros)
    base = entities.join(frame, key).where(visible)
    dedup = base.groupBy("row_id", "event_timestamp").agg(F.max("created_timestamp").alias("created_timestamp"))
    newest = Window.partitionBy("row_id").orderBy(F.col("event_timestamp").desc(), F.col("created_timestamp").desc())
    latest = dedup.withColumn("rank", F.row_number().over(newest)).where("rank = 1").drop("rank")
    return base.join(latest, ["row_id", "event_timestamp", "created_timestamp"]).select("row_id", *features)
