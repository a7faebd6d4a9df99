"""Feature tables → online store: the newest row of each key, written in parallel from the executors.

What is online of a view is a claim that the registry holds: for each key the newest row of the table at a version, of those
with event times in the published intervals. A run brings the claim up to the newest version and adds an interval to it. It
offers rows that were added or changed, and restates keys that have lost a row.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from operator import and_, or_
from typing import Any

from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from spark_fs.errors import ConflictError, SparkFSError
from spark_fs.files import check_readable
from spark_fs.intervals import Interval, intersect, merge, missing, text, to_micros
from spark_fs.offline.changes import changes
from spark_fs.offline.compute import key_bytes, quoted, within
from spark_fs.offline.table_log import Commit, can_be_read_in_place, changed_since
from spark_fs.offline.tables import FeatureTable, observed
from spark_fs.online import compare, executor
from spark_fs.online.connect import has_token, leave_token
from spark_fs.online.redis_store import COUNTS, OnlineTarget, WriteCounts
from spark_fs.registry import Published, Registry
from spark_fs.spec import ViewSpec

#: How often a run begins anew because another one has published or restated the view meanwhile.
_ATTEMPTS = 3
#: What Spark and Delta say of a version whose log or files were cleaned up.
_GONE = (
    *("DELTA_VERSION_NOT_FOUND", "DELTA_FILE_NOT_FOUND", "FILE_NOT_EXIST", "VersionNotFoundException", "DELTA_TIMESTAMP"),
    "TIME_TRAVEL_BEYOND_DELETED_FILE_RETENTION",
)


@dataclass(frozen=True, slots=True)
class MaterializeResult:
    """What one run did for one view.

    ``rows_read`` rows of the feature table were offered, the newest of each key: ``applied`` were written, ``equal`` were
    there already, ``stale`` were older than what was there, ``expired`` were past their ttl. ``withdrawn`` keys had lost
    their row at the source, so that an older one is served, or none. ``bytes`` went to the server. ``note``: what could
    not be done, if anything.
    """

    view: str
    interval: Interval
    table_version: int
    rows_read: int
    applied: int
    equal: int
    stale: int
    expired: int
    withdrawn: int
    bytes: int
    seconds: float
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {**asdict(self), "interval": [text(self.interval.start), text(self.interval.end)]}


@dataclass(frozen=True, slots=True)
class Publication:
    """What a run has to look at, in the table at ``version``.

    Of event times in ``fresh`` every row is offered. Of those in ``compared`` rows are compared with what they were at
    version ``since``. Afterwards all of ``intervals`` is published.
    """

    version: int
    fresh: tuple[Interval, ...]
    compared: tuple[Interval, ...]
    since: int | None
    intervals: tuple[Interval, ...]


def plan_publication(
    log: Sequence[Commit],
    known: Published | None,
    interval: Interval,
    *,
    everything: bool = False,
    repair: bool = False,
) -> Publication:
    """What is to be published for ``interval``, by the table's log (newest first) and what is published already.

    ``everything``: also what was published of it before; ``repair``: all that was published before.
    """
    version = log[0].version
    if known is None:
        return Publication(version, (interval,), (), None, (interval,))
    changed = changed_since(log, known.table_version)
    compared = known.intervals if changed is None else tuple(intersect(known.intervals, changed))
    if repair:
        return Publication(version, known.intervals, compared, known.table_version, known.intervals)
    fresh = (interval,) if everything else tuple(missing(interval, known.intervals))
    return Publication(version, fresh, compared, known.table_version, tuple(merge([*known.intervals, interval])))


def materialize_view(
    registry: Registry,
    table: FeatureTable,
    target: OnlineTarget,
    interval: Interval,
    *,
    restate: bool = False,
    everything: bool = False,
    repair: bool = False,
) -> MaterializeResult:
    """Publish the rows with event times in the interval, and what has changed of all that was published before.

    ``restate``: each key with a row in the interval serves the newest of those from now on, also in the place of a newer one.
    ``everything``: rows of the interval that were published before are sent again. ``repair``: all published rows are written
    again, whatever is there, and rows that should not be there go; the interval adds nothing.

    Writes are guarded, so the same run can be repeated, overlap others and be interrupted at any point; only a run of which
    every row is confirmed is noted as published. Raises SparkFSError SFS-616 where the online store has lost what was
    published, and ConflictError SFS-615 where other runs of the view came in between three times.
    """
    began, counts, withdrawn, rows_read = time.monotonic(), WriteCounts(), 0, 0
    for _ in range(_ATTEMPTS):
        known = registry.published(table.view)
        if known and known.token and not repair:
            _check_not_lost(table.view, target, known.token)
        # In this order: whoever has a generation has looked at the table later than those with a lower one.
        target = replace(target, generation=registry.generation(table.view), erased=registry.erased(table.view))
        log = table.commits()
        todo = plan_publication(log, known, interval, everything=everything or restate, repair=repair)
        run = _Run(registry, table, todo, target, known)
        in_place = can_be_read_in_place(log)
        with suppress(_OvertakenError):
            if repair:
                run.offer_fresh(in_place=in_place, restate=False, repair=True)
                run.bury_extra()
            else:
                # What is restated comes last: it is to stay.
                run.offer_changes()
                run.offer_fresh(in_place=in_place, restate=restate, repair=False)
        counts, withdrawn, rows_read = counts + run.counts, withdrawn + run.withdrawn, rows_read + run.rows_read
        if not run.overtaken and _note(registry, table.view, run, known, todo):
            return MaterializeResult(
                view=table.view.reference,
                interval=interval,
                table_version=todo.version,
                rows_read=rows_read,
                **{name: getattr(counts, name) for name in COUNTS if name != "fenced"},
                withdrawn=withdrawn,
                note=run.note,
                seconds=round(time.monotonic() - began, 3),
            )
    raise ConflictError.of(
        "SFS-615",
        "The view was published, restated or erased from by others, again and again, while this run looked at it.",
        why="What was written is right, but not noted as published.",
        fix="run the same command again when they have ended",
    )


def _check_not_lost(view: ViewSpec, target: OnlineTarget, token: str) -> None:
    if not has_token(target.url, target.prefix, token, socket_timeout_seconds=target.socket_timeout_seconds):
        raise SparkFSError.of(
            "SFS-616",
            f"The online store has lost rows of feature view '{view.reference}'.",
            why="The mark that the last run left there is gone: the server came back without its data, or with older ones.",
            fix=f"run spark-fs repair {view.reference}",
        )


def _note(registry: Registry, view: ViewSpec, run: _Run, known: Published | None, done: Publication) -> bool:
    """Note what is published now; False where another run has noted or restated something meanwhile."""
    same = known and (known.table_version, known.intervals) == (done.version, done.intervals)
    if same and known and known.token and not done.fresh:
        return True
    token, target = uuid.uuid4().hex[:12], run.target
    # The mark first: with it lost, the rows before it may be lost too.
    leave_token(target.url, target.prefix, token, socket_timeout_seconds=target.socket_timeout_seconds)
    return registry.set_published(view, known, Published(done.version, done.intervals, token), run.generation)


class _OvertakenError(Exception):
    """Another run has noted something since this attempt began."""


class _Run:
    """One attempt: what was offered so far, and what became of it."""

    def __init__(
        self, registry: Registry, table: FeatureTable, todo: Publication, target: OnlineTarget, known: Published | None
    ) -> None:
        self._registry, self._table, self._todo, self._known = registry, table, todo, known
        #: Where rows go; and the generation that the view must still have when they are noted.
        self.target, self.generation = target, target.generation
        self.counts, self.withdrawn, self.rows_read = WriteCounts(), 0, 0
        self.note, self._dropped = "", False

    @property
    def overtaken(self) -> bool:
        """Whether others came in between, so that nothing may be noted."""
        return self._dropped or self.counts.fenced > 0

    def offer_fresh(self, *, in_place: bool, restate: bool, repair: bool) -> None:
        """Offer all rows of the fresh intervals; a restatement or a repair lets them win over newer ones."""
        todo, target = self._todo, self.target
        if not todo.fresh:
            return
        if restate or repair:
            target = self._restating(restates=restate)
        if in_place and len(todo.fresh) == 1 and _opens_without_spark(self._table.path):
            counts, read = publish_files(self._table, todo.version, target, todo.fresh[0])
        else:
            counts, read = publish_rows(self._table.view, self._rows(todo.version, todo.fresh), target)
        self.counts, self.rows_read = self.counts + counts, self.rows_read + read
        if restate:
            # So that no other row ever carries the generation of a restatement: by it an audit tells them.
            self.generation = self._registry.raise_generation(self._table.view)

    def offer_changes(self) -> None:
        """Offer rows that were added or changed since they were published, then restate the keys that have lost one."""
        todo, view = self._todo, self._table.view
        if not todo.compared or todo.since is None:
            return
        try:
            self._offer_differences(todo.since)
        except Exception as error:
            if not _is_gone(error):
                raise
            counts, read = publish_rows(view, self._rows(todo.version, todo.compared), self.target)
            self.counts, self.rows_read = self.counts + counts, self.rows_read + read
            self.note = (
                f"Version {todo.since} of the table, which was published last, is gone: all rows were offered, but rows that "
                "builds have removed since may still be served."
            )

    def _offer_differences(self, since: int) -> None:
        todo, view = self._todo, self._table.view
        changed = changes(view, self._rows(since, todo.compared), self._rows(todo.version, todo.compared))
        seen, lost = Observation(), [F.count_if("_lost").alias("lost")]
        watched = changed.observe(seen, *lost)
        counts, read = publish_rows(view, watched.where(~F.col("_lost")).drop("_lost"), self.target)
        self.counts, self.rows_read = self.counts + counts, self.rows_read + read
        if observed(seen, changed, lost)["lost"]:
            at = F.struct("event_timestamp", "created_timestamp")
            self._withdraw(changed.where("_lost").groupBy(*map(quoted, view.key_names)).agg(F.max(at).alias("_lost_at")))

    def _withdraw(self, lost: DataFrame) -> None:
        """Serve what the keys have now, the newest of their rows or none, where that is older than what they have lost."""
        todo, view, target = self._todo, self._table.view, self._restating()
        there = newest_rows(view, self._rows(todo.version, todo.intervals), lost)
        older, _ = _run(there.where(F.col("event_timestamp").isNotNull()), partial(executor.publish_rows, target=target))
        gone = there.where(F.col("event_timestamp").isNull()).select("_key")
        none, _ = _run(gone, partial(executor.bury_rows, target=target))
        self.withdrawn += older.applied + older.expired + none.applied
        both = older + none
        self.counts += WriteCounts(fenced=both.fenced, bytes=both.bytes, replicas=both.replicas)

    def bury_extra(self) -> None:
        """Put tombstones in the place of rows that no published row of the table stands for."""
        published = newest_rows(self._table.view, self._rows(self._todo.version, self._todo.intervals))
        counts, _ = _run(extra_keys(published, self.target), partial(executor.bury_rows, target=self._restating()))
        self.withdrawn += counts.applied
        self.counts += WriteCounts(fenced=counts.fenced, bytes=counts.bytes, replicas=counts.replicas)

    def _restating(self, *, restates: bool = False) -> OnlineTarget:
        """The target of rows that may replace newer ones, all of what was written before.

        Raises _OvertakenError where what was known is noted no more; from here on nobody can note anything without seeing this.
        """
        self.generation = self._registry.raise_generation(self._table.view, restates=restates)
        if self._registry.published(self._table.view) != self._known:
            self._dropped = True
            raise _OvertakenError
        return replace(self.target, generation=self.generation, restating=True)

    def _rows(self, version: int, intervals: Sequence[Interval]) -> DataFrame:
        return self._table.read(version).where(within_any(intervals))


def _is_gone(error: BaseException) -> bool:
    """Whether an old version of a table could not be read, for its log or its files were cleaned up."""
    return any(mark in str(error) for mark in _GONE)


def within_any(intervals: Sequence[Interval]) -> SparkColumn:
    """True for rows whose event time lies in one of the intervals."""
    return reduce(or_, map(within, intervals))


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


def extra_keys(published: DataFrame, target: OnlineTarget) -> DataFrame:
    """``_key`` of each row that is online though it is erased or not in ``published`` (``_key``). One task looks them up."""
    spark = published.sparkSession
    work = partial(compare.stored_keys, target=target)
    stored = spark.range(0, 1, 1, 1).mapInArrow(work, "_key binary, _erased boolean").distinct()
    unknown = stored.where(~F.col("_erased")).join(published.select("_key"), "_key", "left_anti")
    return unknown.unionByName(stored.where("_erased")).select("_key")


def _run(frame: DataFrame, work: Callable[..., Iterator[Any]]) -> tuple[WriteCounts, int]:
    """Let the executors do the work; the sums of what they report, which is that of the task attempts that succeeded."""
    *summed, least = executor.MEASURES
    parts = frame.mapInArrow(work, ", ".join(f"{name} bigint" for name in executor.MEASURES))
    sums = (F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in summed)
    totals = parts.agg(*sums, F.min(least).alias(least)).first()
    assert totals is not None  # an aggregate without groups has one row
    return WriteCounts(**{name: totals[name] for name in (*COUNTS, least)}), totals["rows_read"]


def newest_rows(view: ViewSpec, rows: DataFrame, lost: DataFrame | None = None) -> DataFrame:
    """One row per key, that with the greatest (event_timestamp, created_timestamp): a feature table has no ties on those.

    Columns: ``_key`` (key bytes), event_timestamp, created_timestamp, _build, features. With ``lost`` (the view's keys,
    distinct, and ``_lost_at``, an event and a created time) one row for each of these keys whose newest row is older than
    that, with nulls where the key has no row.
    """
    names = [quoted(name) for name in view.key_names]
    newest_first = Window.partitionBy(*names).orderBy(
        F.col("event_timestamp").desc(), F.col("created_timestamp").desc_nulls_last()
    )
    if lost is not None:
        renamed = rows.withColumnsRenamed({name: f"_row_key{n}" for n, name in enumerate(view.key_names)})
        met = [quoted(name) == F.col(f"_row_key{n}") for n, name in enumerate(view.key_names)]
        rows = lost.join(renamed, reduce(and_, met, F.lit(True)), "left")
    newest = rows.withColumn("_rank", F.row_number().over(newest_first)).where(F.col("_rank") == 1)
    if lost is not None:
        older = F.struct("event_timestamp", "created_timestamp") < F.col("_lost_at")
        newest = newest.where(F.col("event_timestamp").isNull() | older)
    features = [quoted(name) for name in view.feature_names]
    return newest.select(key_bytes(view.keys).alias("_key"), "event_timestamp", "created_timestamp", "_build", *features)
