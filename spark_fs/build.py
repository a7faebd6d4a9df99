"""Sources → feature tables, interval by interval; each interval is replaced as a whole, however often it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame, Observation
from pyspark.sql import functions as F

from spark_fs.errors import InvalidError
from spark_fs.intervals import BEGINNING, Interval, missing, text
from spark_fs.offline.compute import acceptable, instant_literal, quoted, settle, within
from spark_fs.offline.tables import FeatureTable, observed
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What one build of one interval did.

    ``rows_read`` counts the view's rows from the source; of them ``null_keys`` and ``null_times`` were set aside (no table
    can hold them), ``future`` lie past what may be built yet, ``ties_dropped`` lost a tie, ``rows_written`` are in the table.
    ``unchanged``: nothing was read, for the source is as it was and had nothing as late as this.
    """

    view: str
    interval: Interval
    build: int
    table_version: int
    rows_read: int
    rows_written: int
    null_keys: int
    null_times: int
    future: int
    ties_dropped: int
    seconds: float
    unchanged: bool = False

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "interval": [text(self.interval.start), text(self.interval.end)]}


def intervals_to_build(
    done: Sequence[Interval], start: datetime | None, end: datetime | None, now: datetime, max_future: timedelta
) -> list[Interval]:
    """What a build has to do: the given interval as a whole, or without a start all that is missing up to ``end``.

    ``end`` (default: now) is exclusive. Raises InvalidError SFS-408 for an end further in the future than ``max_future``
    (rows dated in error would block what comes later) and SFS-409 for a start that is not before the end or a time without
    zone.
    """
    naive = [name for name, instant in (("start", start), ("end", end)) if instant is not None and instant.tzinfo is None]
    if naive:
        raise InvalidError.of(
            "SFS-409",
            f"The {' and the '.join(naive)} of a build must have a time zone.",
            fix="datetime(…, tzinfo=timezone.utc)",
        )
    end = end or now
    if end > now + max_future:
        raise InvalidError.of(
            "SFS-408",
            f"The end {text(end)} lies too far in the future.",
            why=f"Now is {text(now)}; build.max_future_seconds allows {int(max_future.total_seconds())}.",
            fix="choose an earlier --end",
        )
    if start is None:
        return missing(Interval(BEGINNING, end), done)
    if start >= end:
        raise InvalidError.of("SFS-409", f"The start {text(start)} is not before the end {text(end)}.")
    return [Interval(start, end)]


def note_unchanged(registry: Registry, view: ViewSpec, interval: Interval, source_state: str | None) -> BuildResult | None:
    """Note the interval as built without reading anything, where nothing can be in it; None where something might be.

    Nothing can be in it if the source is in the state in which the last build read it (see ``tables.source_state``), that
    build saw no row past its own end, and the interval begins there.
    """
    last = registry.last_build(view)
    if last is None or source_state is None or last.details.get("source_state") != source_state:
        return None
    if last.details.get("beyond") != 0 or last.interval.end != interval.start:
        return None
    build, version = registry.begin_build(view, interval), last.details["table_version"]
    result = BuildResult(view.reference, interval, build, version, *(0,) * 6, 0.0, unchanged=True)
    details = {**result.to_json(), "source_state": source_state, "beyond": 0}
    registry.finish_build(view, build, "done", details)
    return result


def build_interval(
    registry: Registry,
    table: FeatureTable,
    frame: DataFrame,
    interval: Interval,
    *,
    buckets: int,
    latest: datetime,
    source_state: str | None = None,
) -> BuildResult:
    """Replace one interval of the feature table by the rows of ``frame`` (see ``compute.feature_frame``), in one commit.

    The table is created when it is not there. Rows at or after ``latest`` are counted as future. Runs one Spark job for the
    write; the registry notes the build before and after it.
    """
    view, began = table.view, time.monotonic()
    table.create(buckets)
    build = registry.begin_build(view, interval)
    try:
        seen, kept = Observation(), Observation()
        measures, all_rows = _counts(view, interval, latest), [F.count(F.lit(1)).alias("rows")]
        rows = frame.observe(seen, *measures).where(acceptable(view) & within(interval))
        settled = settle(view, rows, table.buckets()).withColumn("_build", F.lit(build))
        columns = [*view.key_names, "event_timestamp", "created_timestamp", *view.feature_names, "_build", "_bucket"]
        note = {"view": view.reference, "build": build, "interval": [text(interval.start), text(interval.end)]}
        placed = settled.select(*columns)
        table.replace(placed.observe(kept, *all_rows), interval, build, note)
        counts, written = observed(seen, frame, measures), observed(kept, placed, all_rows)["rows"]
    except BaseException as error:
        state = "failed" if isinstance(error, Exception) else "interrupted"
        registry.finish_build(view, build, state, {"error": type(error).__name__})
        raise
    result = BuildResult(
        view=view.reference,
        interval=interval,
        build=build,
        table_version=table.version(),
        rows_read=counts["rows"],
        rows_written=written,
        null_keys=counts["null_keys"],
        null_times=counts["null_times"],
        future=counts["future"],
        ties_dropped=counts["inside"] - written,
        seconds=round(time.monotonic() - began, 3),
    )
    details = {**result.to_json(), "source_state": source_state, "beyond": counts["beyond"]}
    registry.finish_build(view, build, "done", details)
    return result


def _counts(view: ViewSpec, interval: Interval, latest: datetime) -> list[Any]:
    event, inside = F.col("event_timestamp"), acceptable(view) & within(interval)
    no_key = F.lit(False)
    for name in view.key_names:
        no_key = no_key | quoted(name).isNull()
    return [
        F.count(F.lit(1)).alias("rows"),
        F.count_if(no_key).alias("null_keys"),
        F.count_if(~no_key & event.isNull()).alias("null_times"),
        F.count_if(event >= instant_literal(latest)).alias("future"),
        F.count_if(event >= instant_literal(interval.end)).alias("beyond"),
        F.count_if(inside).alias("inside"),
    ]
