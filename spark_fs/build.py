"""Sources → feature tables, interval by interval; each interval is replaced as a whole, however often it runs.

And the upkeep of what many builds leave: tables of many small files are rewritten with one sorted file a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame, Observation
from pyspark.sql import functions as F

from spark_fs.config import MOST_BUCKETS
from spark_fs.errors import ConflictError, InvalidError, summary
from spark_fs.intervals import BEGINNING, Interval, missing, text
from spark_fs.offline.compute import acceptable, instant_literal, quoted, within
from spark_fs.offline.sources import source_bytes
from spark_fs.offline.table_log import Commit, Rewrite, files_are_sorted
from spark_fs.offline.tables import FeatureTable, Replaced, observed
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec

#: With ``auto``, a bucket gets at most so much of the source at first, and a table no fewer buckets than this.
_BYTES_PER_BUCKET, _FEWEST_BUCKETS = 64 * 2**20, 8
#: The buckets of a table where nothing tells how large its source is.
_BUCKETS_UNTOLD = 16
#: How often a rewrite is tried that others come in the way of.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What one build of one interval did.

    ``rows_read`` counts the view's rows from the source; of them ``null_keys`` and ``null_times`` were set aside (no table
    can hold them), ``future`` lie past what may be built yet, ``ties_dropped`` lost a tie, ``rows_written`` are in the table.
    ``unchanged``: nothing was read, for the source is as it was and had nothing as late as this. ``optimized``: the table had
    too many files a bucket and was rewritten; ``files`` are its data files before and after. ``optimize_error`` says why that
    failed; the build's rows are in the table all the same. ``why_delta``: why the files were written by Delta's own writer,
    which takes longer; None where Python workers wrote them.
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
    optimized: bool = False
    files: tuple[int, int] | None = None
    optimize_error: str | None = None
    why_delta: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        files = list(self.files) if self.files else None
        return {**asdict(self), "interval": [text(self.interval.start), text(self.interval.end)], "files": files}

    def to_row(self) -> dict[str, Any]:
        """The result as a row for people: of the upkeep only whether there was one, and its data files before and after."""
        row = self.to_json()
        files = row.pop("files")
        del row["optimize_error"], row["why_delta"]  # too long for a cell
        return {**row, "optimized": files or self.optimized}


def choose_buckets(source_bytes: int | None) -> int:
    """How many buckets a new table gets: the smallest power of two, 8 to 1024, with at most 64 MB of its source in each.

    16 where the size is not known.
    """
    if source_bytes is None:
        return _BUCKETS_UNTOLD
    enough = -(-source_bytes // _BYTES_PER_BUCKET)
    return min(max(1 << max(enough - 1, 0).bit_length(), _FEWEST_BUCKETS), MOST_BUCKETS)


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
    buckets: int | None,
    latest: datetime,
    source_state: str | None = None,
) -> BuildResult:
    """Replace one interval of the feature table by the rows of ``frame`` (see ``compute.feature_frame``), in one commit.

    The table is created when it is not there, with ``buckets`` buckets (None: see ``choose_buckets``). Rows at or after
    ``latest`` are counted as future. Runs one Spark job for the write; the registry notes the build before and after it.
    """
    view, began = table.view, time.monotonic()
    if not table.exists():
        table.create(choose_buckets(source_bytes(frame)) if buckets is None else buckets)
    build = registry.begin_build(view, interval)
    try:
        counts, done = _replace(table, frame, interval, build, latest)
    except BaseException as error:
        state = "failed" if isinstance(error, Exception) else "interrupted"
        registry.finish_build(view, build, state, {"error": type(error).__name__})
        raise
    result = BuildResult(
        view=view.reference,
        interval=interval,
        build=build,
        table_version=done.version,
        rows_read=counts["rows"],
        rows_written=counts["inside"] - done.ties_dropped,
        null_keys=counts["null_keys"],
        null_times=counts["null_times"],
        future=counts["future"],
        ties_dropped=done.ties_dropped,
        seconds=round(time.monotonic() - began, 3),
        why_delta=done.why_delta or None,
    )
    details = {**result.to_json(), "source_state": source_state, "beyond": counts["beyond"]}
    registry.finish_build(view, build, "done", details)
    return result


def _replace(
    table: FeatureTable, frame: DataFrame, interval: Interval, build: int, latest: datetime
) -> tuple[dict[str, Any], Replaced]:
    """Put the frame's rows of the interval into the table: what was counted of the frame, and what the table says."""
    view, measures, seen = table.view, _counts(table.view, interval, latest), Observation()
    rows = frame.observe(seen, *measures).where(acceptable(view) & within(interval))
    done = table.replace(rows, interval, build)
    return observed(seen, frame, measures), done


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


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """What an upkeep of a table will do: the rewrite (None: nothing), and why."""

    rewrite: Rewrite | None
    reason: str


def plan_rewrite(log: Sequence[Commit], files: Mapping[int, int], buckets: int, wanted: int | None = None) -> RewritePlan:
    """Decide which buckets of a table to write anew: those with several files, and those whose file may be unsorted.

    ``log``: the table's commits, newest first. ``files``: how many data files each bucket has at the newest of them, out of
    ``buckets`` buckets. With another number ``wanted`` all rows are moved into so many buckets.
    """
    version = log[0].version
    if wanted is not None and wanted != buckets:
        return RewritePlan(Rewrite(version, wanted, tuple(range(wanted))), f"from {buckets} to {wanted} buckets")
    several = [bucket for bucket, count in sorted(files.items()) if count > 1]
    if not files_are_sorted(log):
        return _planned(version, buckets, sorted(files), f"{len(several)} with several files, the others perhaps unsorted")
    return _planned(version, buckets, several, f"{len(several)} with several files")


def _planned(version: int, buckets: int, chosen: Sequence[int], reason: str) -> RewritePlan:
    if not chosen:
        return RewritePlan(None, "nothing to do: one sorted file a bucket")
    return RewritePlan(Rewrite(version, buckets, tuple(chosen)), f"{len(chosen)} of {buckets} buckets: {reason}")


@dataclass(frozen=True, slots=True)
class OptimizeResult:
    """What upkeep did to one feature table: of its ``buckets`` buckets ``rewritten`` were written anew, with ``rows`` rows.

    ``files``: data files before and after. ``table_version`` is that of the commit; where there was nothing to do, the
    newest, and ``rewritten`` is 0.
    """

    view: str
    table_version: int
    buckets: int
    rewritten: int
    rows: int
    files: tuple[int, int]
    reason: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "files": list(self.files)}


def optimize_table(table: FeatureTable, buckets: int | None = None) -> OptimizeResult:
    """Leave one sorted file in each bucket of the table, or redistribute it to ``buckets`` buckets; no row changes.

    One commit, or none where there is nothing to do. Runs Spark jobs over the buckets that need it. Raises ConflictError
    SFS-410 where others came in the way again and again.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            return _optimize(table, buckets)
        except ConflictError:
            if not attempts_left:
                raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def _optimize(table: FeatureTable, buckets: int | None) -> OptimizeResult:
    began, log = time.monotonic(), table.commits()
    version = log[0].version
    before, having = table.files_by_bucket(version), table.buckets(version)
    plan, rows = plan_rewrite(log, before, having, buckets), 0
    if plan.rewrite:
        version, rows = table.rewrite(plan.rewrite)
    after = table.files_by_bucket(version)
    return OptimizeResult(
        view=table.view.reference,
        table_version=version,
        buckets=plan.rewrite.buckets if plan.rewrite else having,
        rewritten=len(plan.rewrite.rewritten) if plan.rewrite else 0,
        rows=rows,
        files=(before.total(), after.total()),
        reason=plan.reason,
        seconds=round(time.monotonic() - began, 3),
    )


def keep_layout(table: FeatureTable, built: BuildResult, max_files_per_bucket: int) -> BuildResult:
    """Optimize the table after a build if it has more files a bucket, on average, than allowed (0: any number).

    The build's result, with what came of it; its rows are committed, so no failure is raised.
    """
    if built.unchanged or not max_files_per_bucket:
        return built
    try:
        version = table.version()
        files = len(table.data_files(version))
        if files <= max_files_per_bucket * table.buckets(version):
            return built
        done = optimize_table(table)
    except Exception as error:  # noqa: BLE001  # what was built must not be reported as failed
        return replace(built, optimize_error=summary(error))
    return replace(built, optimized=done.rewritten > 0, files=done.files)
