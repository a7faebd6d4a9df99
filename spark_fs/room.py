"""Whether what a run offers fits into the online store: asked of the table's log and one data file, of Spark only in doubt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_fs.dispatch import online_columns, within_any
from spark_fs.intervals import BEGINNING, UTC, Interval, intersect
from spark_fs.offline.compute import key_bytes
from spark_fs.offline.layout import read_layout
from spark_fs.offline.tables import FeatureTable
from spark_fs.online import executor
from spark_fs.online.capacity import SAMPLE_ROWS, Demand, bytes_per_key, check_capacity, free_bytes, share_online
from spark_fs.online.connect import masters, open_client
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.spec import ViewSpec

if TYPE_CHECKING:
    import pyarrow as pa
    import redis

#: How many keys are looked up online to learn how many of all are there, about.
_SAMPLE_KEYS = 2_000
#: By how much the number of all keys may be wrong, mostly.
_KEYS_ERROR = 0.02


def check_room(table: FeatureTable, version: int, intervals: Sequence[Interval], target: OnlineTarget) -> None:
    """Refuse to publish the rows of a version of the table with event times in the intervals if they do not fit: SFS-621.

    Rows that are past their ttl by now are not counted, keys that are online already neither where the run might not fit: only
    then Spark jobs are started, two short ones, and where Spark alone can open the table. A server that does not tell what
    is free is not asked further. Raises SFS-601 and SFS-602 too, and SFS-609 for rows that do not fit their types.
    """
    alive = intersect(intervals, [_alive(table.view.ttl)])
    if not alive:
        return
    with open_client(target.url, socket_timeout_seconds=target.socket_timeout_seconds) as client:
        servers = masters(client)
        free = free_bytes(servers)
        if free is None:
            return

        def rows() -> DataFrame:
            return table.read(version).where(within_any(alive))

        most, sample = _from_files(table, version, alive, target) or _from_spark(table.view, rows())
        if sample is not None:
            demand = Demand(most, bytes_per_key(sample, target, servers), free)
            check_capacity(demand, lambda: _new_keys(table.view, rows(), target, servers))


def _alive(ttl: timedelta | None) -> Interval:
    """The event times that are not past a ttl by now."""
    now = datetime.now(UTC)
    oldest = now - ttl if ttl and ttl < now - BEGINNING else BEGINNING
    return Interval(oldest, datetime.max.replace(tzinfo=UTC))


def _from_files(
    table: FeatureTable, version: int, intervals: Sequence[Interval], target: OnlineTarget
) -> tuple[int, pa.RecordBatch | None] | None:
    """How many rows of the intervals the table has at most, and some rows of it; None where only Spark can tell."""
    _, layout, _ = read_layout(table.path, version)
    if layout is None:
        return None
    files = [file for file in layout.files if any(map(file.may_overlap, intervals))]
    if not all(file.rows for file in files):  # somebody else's, without statistics
        return None
    largest = max(files, key=lambda file: file.rows, default=None)
    sample = executor.first_rows(largest.path, target, table.view.keys, SAMPLE_ROWS) if largest else None
    return sum(file.rows for file in files), sample


def _from_spark(view: ViewSpec, rows: DataFrame) -> tuple[int, pa.RecordBatch | None]:
    """How many rows there are, and some of them. Runs two Spark jobs."""
    some = rows.select(*online_columns(view)).limit(SAMPLE_ROWS).toArrow()
    return rows.count(), next(iter(some.combine_chunks().to_batches()), None)


def _new_keys(view: ViewSpec, rows: DataFrame, target: OnlineTarget, servers: Sequence[redis.Redis]) -> int:
    """About how many keys the rows have that are not online: counted, and looked up by a sample. Runs two Spark jobs."""
    keys = rows.select(key_bytes(view.keys).alias("_key"))
    row = keys.agg(F.approx_count_distinct("_key", _KEYS_ERROR)).first()
    assert row is not None  # an aggregate without groups has one row
    several = F.pmod(F.xxhash64("_key"), F.lit(max(1, row[0] // _SAMPLE_KEYS))) == 0
    sample = [bytes(key) for (key,) in keys.where(several).distinct().collect()]
    return int(row[0] * (1 - share_online(sample, target, servers)))
