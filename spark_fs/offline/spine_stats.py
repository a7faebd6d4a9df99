"""What the spine tells before the join, and, where it is small, the spine itself: read once, by the driver.

A large spine is counted in a job of its own, and read again by the join, which moves it. That is two scans, a shuffle and the
planning of both, for a table that often is some megabytes. So a spine that is known to be small comes to the driver with its
residues; it is counted there, cut into tasks, and sent to them as Arrow data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import reduce
from itertools import pairwise
from operator import and_
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_fs.intervals import BEGINNING, UTC, from_micros, to_micros
from spark_fs.key_bytes import can_be_key
from spark_fs.offline.asof_plan import SpineStats
from spark_fs.offline.blocks import Integers, as_integers
from spark_fs.offline.colocated import NO_RESIDUE
from spark_fs.offline.compute import key_residue
from spark_fs.offline.placement import RESIDUES, Placement
from spark_fs.offline.spine_files import LargeSpineError, read_plain_files, residues_of

_LAST = datetime.max.replace(tzinfo=UTC)
#: A spine is read by the driver if Spark's planner gives its sources at most so many bytes …
_SMALL_BYTES = 32 << 20
#: … and kept there if it takes at most so many in Arrow.
_SMALL_ARROW_BYTES = 64 << 20
#: Nodes of a plan that give about as many rows as they get, or fewer.
_SAME_ROWS = frozenset(
    {
        *("LogicalRelation", "LocalRelation", "Range", "OneRowRelation", "Union"),
        *("Project", "Filter", "SubqueryAlias", "Aggregate", "Distinct", "Deduplicate", "Window"),
        *("Sort", "GlobalLimit", "LocalLimit", "Offset", "Sample", "Repartition", "RepartitionByExpression", "Coalesce"),
    }
)


def spine_stats(
    spine: DataFrame,
    time_column: str,
    keys: Iterable[Sequence[str]] = (),
    residues: Iterable[Sequence[str]] = (),
) -> SpineStats:
    """Count the spine, for ``plan_asof``: rows, range of times, and for tuples of key columns how their values are spread.

    ``keys``: tuples whose distinct values are estimated, which a window join uses; ``residues``: tuples whose rows are counted
    by the checksum of their values, which a colocated join uses. One Spark job, a second where both are asked; no other
    function here starts one. The spine is evaluated here and again by the join; what is pruned rests on both giving the same
    rows: persist a spine that does not (a sample, a LIMIT, rand()).
    """
    tuples = list(dict.fromkeys(tuple(names) for names in residues if names))
    distinct = sorted({tuple(sorted(names)) for names in keys if names})
    if not tuples:
        return _counted(spine, time_column, distinct)
    stats = _counted_by_residue(spine, time_column, tuples)
    return replace(stats, distinct_keys=_counted(spine, time_column, distinct).distinct_keys) if distinct else stats


def _counted(spine: DataFrame, time_column: str, tuples: Sequence[tuple[str, ...]]) -> SpineStats:
    plain, at = plainly_named(spine)
    time = F.col(at[time_column])
    counted = [F.count_if(time.isNull()), F.min(F.unix_micros(time)), F.max(F.unix_micros(time))]
    for names in tuples:
        columns = [F.col(at[name]) for name in names]
        present = reduce(and_, (column.isNotNull() for column in columns))
        counted.append(F.approx_count_distinct(F.when(present, F.xxhash64(*columns))))
    row = plain.agg(F.count(F.lit(1)), *counted).first()
    assert row is not None  # an aggregate without groups always gives one row
    rows, null_times, first, last, *distinct = row
    return SpineStats(rows, null_times, _instant(first), _instant(last), dict(zip(tuples, distinct, strict=True)))


def _counted_by_residue(spine: DataFrame, time_column: str, tuples: Sequence[tuple[str, ...]]) -> SpineStats:
    plain, at = plainly_named(spine)
    types, time = dict(spine.dtypes), F.col(at[time_column])
    each = [key_residue([(F.col(at[name]), types[name]) for name in names], RESIDUES) for names in tuples]
    # Each row once per tuple; times are taken from the first alone. One tuple, the usual case, needs no rows multiplied.
    several = F.posexplode(F.array(*each)).alias("tuple", "residue")
    spread = plain.select(
        F.unix_micros(time).alias("time"),
        *([several] if len(tuples) > 1 else [F.lit(0).alias("tuple"), each[0].alias("residue")]),
    )
    counts = (F.count(F.lit(1)), F.count("time"), F.min("time"), F.max("time"))
    found = spread.groupBy("tuple", "residue").agg(*counts).collect()
    by_tuple = [[0] * RESIDUES for _ in tuples]
    for number, residue, rows, *_ in found:
        if residue is not None:
            by_tuple[number][residue] = rows
    firsts = [row for row in found if row[0] == 0]
    timed = [(first, last) for *_, first, last in firsts if first is not None]
    total = sum(row[2] for row in firsts)
    return SpineStats(
        rows=total,
        null_times=total - sum(row[3] for row in firsts),
        first=_instant(min(first for first, _ in timed)) if timed else None,
        last=_instant(max(last for _, last in timed)) if timed else None,
        residues={names: tuple(counted) for names, counted in zip(tuples, by_tuple, strict=True)},
    )


def _instant(micros: int | None) -> datetime | None:
    """The instant, or the nearest that Python has where Spark's years go further."""
    return None if micros is None else from_micros(min(max(micros, to_micros(BEGINNING)), to_micros(_LAST)))


def plainly_named(frame: DataFrame) -> tuple[DataFrame, dict[str, str]]:
    """The frame with names of our own and the map to them, so that no user's name needs quoting or can clash.

    Our names sort as the user's do, for the row hash goes by name order.
    """
    at = {name: f"c{rank:06}" for rank, name in enumerate(sorted(set(frame.columns)))}
    return frame.toDF(*(at[name] for name in frame.columns)), at


@dataclass(frozen=True)
class SmallSpine:
    """A spine in the driver's memory: ``rows`` with plain names, ``at`` has theirs by the user's; residues by keys."""

    stats: SpineStats
    rows: pa.Table
    at: Mapping[str, str]
    residues: Mapping[tuple[str, ...], Integers]

    def by_task(self, keys: tuple[str, ...], placement: Placement) -> list[pa.Table]:
        """The rows of each task, by their ``residue`` (modulo the placement's; NO_RESIDUE where a key is null)."""
        places = np.arange(self.rows.num_rows)
        residues = self.residues[keys]
        residues = np.where(residues >= 0, residues % placement.modulus, NO_RESIDUE)
        shares = np.asarray(placement.shares)
        first = np.cumsum(shares) - shares
        # A residue with several shares may be cut anyhow, for every row is joined by itself; rows without key go anywhere.
        tasks = np.asarray(placement.tasks)[first[residues] + places % shares[residues]]
        tasks = np.where(residues >= 0, tasks, places % placement.count)
        order = _order(tasks * (RESIDUES + 1) + residues, placement.count * (RESIDUES + 1))
        rows = self.rows.append_column("residue", pa.array(residues)).take(pa.array(order)).combine_chunks()
        bounds = np.searchsorted(tasks[order], np.arange(placement.count + 1))
        return [rows.slice(start, end - start) for start, end in pairwise(bounds.tolist())]


def _order(numbers: Integers, bound: int) -> npt.NDArray[np.intp]:
    """The positions that sort numbers from -1 up to a bound; those of 16 bits are sorted by counting, six times as fast."""
    if bound < 2**15:
        return np.argsort(numbers.astype(np.int16), kind="stable")
    return np.argsort(numbers)


def small_spine(spine: DataFrame, time_column: str, tuples: Iterable[Sequence[str]]) -> SmallSpine | None:
    """The spine and its ``SpineStats``, with residues by these tuples of key columns; None if it is not small.

    In one Spark job, or in none where the spine is plain Parquet files (see ``spine_files``).

    Small is what Spark's planner gives at most 32 MB without joins and other nodes that multiply rows, and what takes at most
    64 MB in Arrow. Not so otherwise, or where the planner cannot tell: then mostly no job was run.
    """
    # Without a bound on batches pyspark cannot send the rows to the tasks.
    if int(spine.sparkSession.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") or 0) <= 0 or not _looks_small(spine):
        return None
    plain, at = plainly_named(spine)
    keys = list(dict.fromkeys(tuple(names) for names in tuples if names))
    try:
        rows = read_plain_files(spine, _SMALL_ARROW_BYTES)
    except LargeSpineError:
        return None
    if rows is not None and all(can_be_key(rows.schema.field(name).type) for names in keys for name in names):
        residues = [residues_of([rows[name] for name in names], RESIDUES) for names in keys]
        rows = rows.rename_columns(plain.columns)
    else:
        fetched = _fetched(plain, [[(F.col(at[name]), dict(spine.dtypes)[name]) for name in names] for names in keys])
        if fetched is None:
            return None
        rows, residues = fetched
    if rows.nbytes > _SMALL_ARROW_BYTES:
        return None
    times = rows[at[time_column]]
    known = as_integers(times.drop_null())
    stats = SpineStats(
        rows=rows.num_rows,
        null_times=times.null_count,
        first=_instant(int(known.min())) if len(known) else None,
        last=_instant(int(known.max())) if len(known) else None,
        residues={
            names: tuple(np.bincount(found[found >= 0], minlength=RESIDUES).tolist())
            for names, found in zip(keys, residues, strict=True)
        },
    )
    return SmallSpine(stats, rows, at, dict(zip(keys, residues, strict=True)))


def _fetched(plain: DataFrame, keys: Sequence[Sequence[tuple[Column, str]]]) -> tuple[pa.Table, list[Integers]] | None:
    """The rows and the residues of keys, by a Spark job; None where they are more than Spark sends to the driver."""
    each = [F.coalesce(key_residue(key, RESIDUES), F.lit(NO_RESIDUE)).alias(f"residue{n}") for n, key in enumerate(keys)]
    try:
        found = plain.select("*", *each).toArrow()
    except Exception as error:
        if "maxResultSize" in str(error):  # the planner was wrong
            return None
        raise
    return found.select(plain.columns), [as_integers(found[f"residue{number}"]) for number in range(len(keys))]


def _looks_small(spine: DataFrame) -> bool:
    try:
        plan = spine._jdf.queryExecution().optimizedPlan()
    except PySparkException:  # Spark Connect shows no plan
        return False
    return _has_same_rows(plan) and int(plan.stats().sizeInBytes()) <= _SMALL_BYTES


def _has_same_rows(plan: Any) -> bool:
    """Whether no node of the plan multiplies rows."""
    children = plan.children()
    return str(plan.nodeName()) in _SAME_ROWS and all(_has_same_rows(children.apply(n)) for n in range(children.size()))
