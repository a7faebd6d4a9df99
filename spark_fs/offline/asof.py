"""The as-of join: for each spine row the newest feature row of its keys that was visible at its time.

``asof_join`` joins any two DataFrames. Many views at once: ``spine_stats`` looks at the spine, ``plan_asof`` decides,
``execute`` does it (DataFrame → DataFrame, lazy).

What is visible: event ≤ t, and event ≥ t - ttl where the view has a ttl, both inclusive; with ``known_at`` also
created ≤ t. The winner has the greatest (event, created, row hash), null created first. All values come from that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import reduce
from itertools import islice
from operator import and_, or_

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema, to_arrow_type
from pyspark.sql.types import DataType, StructField, StructType

from spark_fs.intervals import to_micros
from spark_fs.offline.asof_plan import AsofGroup, AsofPlan, AsofView, SpineStats, plan_asof
from spark_fs.offline.colocated import NO_RESIDUE, PackedJoin, PartitionJoin, Scan, pack
from spark_fs.offline.compute import key_residue, row_hash
from spark_fs.offline.layout import DataFile
from spark_fs.offline.placement import Placement
from spark_fs.offline.spine_stats import SmallSpine, plainly_named, spine_stats

__all__ = ["AsofGroup", "AsofPlan", "AsofView", "SpineStats", "asof_join", "execute", "plan_asof", "spine_stats"]

_MICROSECOND = timedelta(microseconds=1)
#: Types that Spark cannot hash; such columns take no part in the last tie-break of ``asof_join``.
_UNHASHABLE = ("map<", "variant")
#: At equal times feature rows come before spine rows: a feature row exactly at t is visible.
_FEATURE_SIDE, _SPINE_SIDE = 0, 1


def why_not_arrow(spine: DataFrame) -> str:
    """Why the spine's rows cannot pass through Arrow, or an empty text."""
    try:
        to_arrow_schema(spine.schema, timezone="UTC")
    except Exception as error:  # noqa: BLE001  # pyspark raises several kinds, by the type of column
        return f"the spine has a column that Arrow does not know: {next(iter(str(error).splitlines()), '')}"
    return ""


def parallelism(spark: SparkSession) -> int:
    """How many tasks the session runs at a time; by its shuffle partitions where it does not tell (Spark Connect)."""
    try:
        return max(int(spark.sparkContext.defaultParallelism), 1)
    except PySparkException:
        return max(int(spark.conf.get("spark.sql.shuffle.partitions") or 1), 1)


def native_asof_note(spark: SparkSession) -> tuple[str, ...]:
    """A line for ``explain`` where this Spark has a sort-merge as-of join of its own (SPARK-56887); we do not use it."""
    setting = "spark.sql.join.sortMergeAsOfJoin.enabled"
    found = spark.conf.get(setting, None)
    return () if found is None else (f"This Spark has a sort-merge as-of join of its own ({setting}={found}); it is not used.",)


def execute(plan: AsofPlan, spine: DataFrame, frames: Mapping[str, DataFrame], small: SmallSpine | None = None) -> DataFrame:
    """The spine's columns, untouched and in order, then the features in the order asked for; one row per spine row.

    ``frames`` has the feature rows of each view by its name; ``small`` the spine's rows, if the plan was made for that. Lazy:
    no job, no caching, no settings changed. Rows come in no particular order. A spine row with a null key or time, or without
    a visible feature row, gets nulls; feature rows with a null key or time match nothing. All rows of one key pass through one
    task.
    """
    joined = spine
    for group in plan.groups:
        if group.strategy == "window":
            joined = _window(plan, group, joined, spine, frames)
        else:
            joined = _colocated(plan, group, joined, small if group.packed else None)
    names = (*plan.spine_columns, *plan.outputs)
    if joined.columns == list(names):
        return joined
    plain, at = plainly_named(joined)
    return plain.select(*(F.col(at[name]).alias(name, metadata=joined.schema[name].metadata) for name in names))


def asof_join(
    spine: DataFrame,
    features: DataFrame,
    on: str | Sequence[str] | Mapping[str, str],
    *,
    spine_time: str = "event_timestamp",
    event_time: str = "event_timestamp",
    created_time: str | None = None,
    ttl: timedelta | None = None,
    known_at: bool = False,
    columns: Sequence[str] | None = None,
    prefix: str = "",
) -> DataFrame:
    """Each spine row with the values of the newest row of ``features`` visible at its time; for any two DataFrames.

    ``on`` names the keys, as one name, several, or {spine column: feature column}; an empty list joins by time alone
    (in one task). Visible: ``t - ttl ≤ event_time ≤ t``, both inclusive, no lower bound where ttl is None or zero; with
    ``known_at`` also ``created_time ≤ t`` (null: not visible). Ties in event time go to the greatest created time (null
    first), then to the greatest hash of all other columns.

    Gives exactly one row per spine row: its columns untouched and in order, then ``columns`` (default: all but keys and
    times) named ``prefix + name``; nulls where nothing is visible or a key or time is null. Lazy, starts no job. Raises
    InvalidError as ``plan_asof`` does.
    """
    keys = {on: on} if isinstance(on, str) else dict(on) if isinstance(on, Mapping) else {name: name for name in on}
    structural = {*keys.values(), event_time, created_time}
    values = [(name, type_) for name, type_ in features.dtypes if name not in structural]
    asked = [name for name, _ in values] if columns is None else list(columns)
    view = AsofView(
        name="features",
        keys=tuple(keys.items()),
        features=tuple((name, prefix + name) for name in asked),
        columns=tuple(features.dtypes),
        event_time=event_time,
        created_time=created_time,
        ttl=ttl,
        hash_columns=tuple(name for name, type_ in values if not any(mark in type_ for mark in _UNHASHABLE)),
    )
    plan = plan_asof([view], spine.dtypes, spine_time=spine_time, known_at=known_at)
    return execute(plan, spine, {view.name: features})


def _window(
    plan: AsofPlan, group: AsofGroup, joined: DataFrame, spine: DataFrame, frames: Mapping[str, DataFrame]
) -> DataFrame:
    """All views of the group through one shuffle: a running winner over spine and feature rows in order of time.

    Each row is narrow: keys, time, side, and one struct that holds the spine row or one view's values.
    """
    plain, at = plainly_named(joined)
    features = [_feature_rows(plan, group, index, frames, spine) for index in range(len(group.views))]
    rows = reduce(
        lambda left, right: left.unionByName(right, allowMissingColumns=True),
        [_spine_rows(plan, group, plain, at), *features],
    )
    ties = [F.col(name) for name in ("created", "hash") if name in rows.columns]
    order = ["time", "side"] if plan.known_at else ["time", "side", *ties]
    window = (
        Window.partitionBy(*_key_names(group), "spread")
        .orderBy(*order)
        .rowsBetween(Window.unboundedPreceding, Window.currentRow)
    )
    winners = [
        (_newest_known(F.col(f"view{index}"), ties) if plan.known_at else _newest(F.col(f"view{index}"))).over(window)
        for index in range(len(group.views))
    ]
    # Filtered after the window: below it the feature rows would be gone.
    running = rows.select("side", "time", "spine", *(w.alias(f"winner{index}") for index, w in enumerate(winners)))
    matched = running.where(F.col("side") == _SPINE_SIDE)
    fields = [F.col("spine").getField(at[f.name]).alias(f.name, metadata=f.metadata) for f in joined.schema.fields]
    for index, view in enumerate(group.views):
        winner = F.col(f"winner{index}")
        fresh = F.when(_fresh(F.col("time"), winner.getField("event"), view.ttl), winner)
        fields += [fresh.getField(f"value{n}").alias(output) for n, (_, output) in enumerate(view.features)]
    return matched.select(*fields)


def _spine_rows(plan: AsofPlan, group: AsofGroup, plain: DataFrame, at: Mapping[str, str]) -> DataFrame:
    keys = [F.col(at[name]) for name, _ in group.keys]
    # Rows with a null key match nothing; left together they would all land in one task.
    unmatched = reduce(or_, (key.isNull() for key in keys), F.lit(False))
    return plain.select(
        *(key.cast(type_).alias(name) for key, name, (_, type_) in zip(keys, _key_names(group), group.keys, strict=True)),
        F.when(unmatched, F.spark_partition_id()).alias("spread"),
        F.col(at[plan.spine_time]).alias("time"),
        F.lit(_SPINE_SIDE).alias("side"),
        F.struct(*sorted(at.values())).alias("spine"),
    )


def _feature_rows(plan: AsofPlan, group: AsofGroup, index: int, frames: Mapping[str, DataFrame], spine: DataFrame) -> DataFrame:
    view = group.views[index]
    plain, at = plainly_named(frames[view.name])
    event = F.col(at[view.event_time])
    created = None if view.created_time is None else F.col(at[view.created_time])
    keys = [F.col(at[feature_key]).cast(type_) for (_, feature_key), (_, type_) in zip(view.keys, group.keys, strict=True)]
    plain = plain.where(_possible(plan, view, event, created, keys))
    if group.semi_join:
        known = _spine_keys(group, spine)
        plain = plain.join(
            F.broadcast(known),
            [key == known[name] for key, name in zip(keys, _key_names(group), strict=True)],
            "left_semi",
        )
    values = [F.col(at[name]).alias(f"value{n}") for n, (name, _) in enumerate(view.features)]
    return plain.select(
        *(key.alias(name) for key, name in zip(keys, _key_names(group), strict=True)),
        _visible_from(event, created, known_at=plan.known_at).alias("time"),
        F.lit(_FEATURE_SIDE).alias("side"),
        *([] if created is None else [created.alias("created")]),
        *([] if view.unique else [row_hash([at[name] for name in view.hash_columns]).alias("hash")]),
        F.struct(event.alias("event"), *values).alias(f"view{index}"),
    )


def _possible(plan: AsofPlan, view: AsofView, event: Column, created: Column | None, keys: Sequence[Column]) -> Column:
    """Whether a feature row can be visible to any spine row."""
    needed = [*keys, event, *([created] if plan.known_at and created is not None else [])]
    conditions = [column.isNotNull() for column in needed]
    if bounds := plan.time_range(view):
        # Literals made from microseconds: no text, so no session time zone.
        start, end = (F.timestamp_micros(F.lit(to_micros(instant))) for instant in bounds)
        conditions += [event <= end, *([event >= start] if view.ttl else [])]
        if plan.known_at and created is not None:
            conditions.append(created <= end)
    return reduce(and_, conditions)


def _spine_keys(group: AsofGroup, spine: DataFrame) -> DataFrame:
    """The spine's distinct keys; from the spine itself, so that no earlier group's join is computed twice."""
    plain, at = plainly_named(spine)
    keys = [F.col(at[name]).cast(type_).alias(key) for (name, type_), key in zip(group.keys, _key_names(group), strict=True)]
    return plain.select(*keys).dropna().distinct()


def _visible_from(event: Column, created: Column | None, *, known_at: bool) -> Column:
    return F.greatest(event, created) if known_at and created is not None else event


def _newest(values: Column) -> Column:
    """The last row's values in (event, created, hash) order; whole rows, so a null in the newest row stays null."""
    return F.last(values, ignorenulls=True)


def _newest_known(values: Column, ties: Sequence[Column]) -> Column:
    """The values of the greatest (event, created, hash); here rows come in order of becoming visible."""
    return F.max_by(values, F.when(values.isNotNull(), F.struct(values.getField("event"), *ties)))


def _fresh(time: Column, event: Column, ttl: timedelta | None) -> Column:
    """Whether the winner is not older than the ttl. If the newest visible row is too old, so are all others.

    In microseconds: Spark's interval arithmetic follows the session time zone across daylight saving changes.
    """
    return F.unix_micros(time) - F.unix_micros(event) <= F.lit(ttl // _MICROSECOND) if ttl else F.lit(True)


def _key_names(group: AsofGroup) -> list[str]:
    return [f"key{position}" for position in range(len(group.keys))]


def _colocated(plan: AsofPlan, group: AsofGroup, joined: DataFrame, small: SmallSpine | None) -> DataFrame:
    """All views of the group by one function over Arrow batches, which reads the views' files itself."""
    plain, at = plainly_named(joined)
    types = [dict(view.columns)[name] for view in group.views for name, _ in view.features]
    # Parsed by the JVM in one call, not one for each of many features.
    declared = DataType.fromDDL(", ".join(f"value{number} {type_}" for number, type_ in enumerate(types)) or "struct<>")
    assert isinstance(declared, StructType)
    fields = declared.fields
    remaining = iter(fields)
    own = [list(islice(remaining, len(view.features))) for view in group.views]
    join = PartitionJoin(
        scans=tuple(_scan(view, files, mine, at) for view, files, mine in zip(group.views, group.files, own, strict=True)),
        names=tuple(column.name for column in fields),
        time=at[plan.spine_time],
        residue="residue",
        modulus=group.placement.modulus if group.placement else 1,
        known_at=plan.known_at,
    )
    schema = StructType([*plain.schema.fields, *fields])
    if small is None:
        keys = [(F.col(at[name]), dict(joined.dtypes)[name]) for name, _ in group.keys]
        moved = plain.withColumn("residue", F.lit(0))
        if group.placement is not None:
            moved = _placed(plain, keys, F.col(at[plan.spine_time]), group.placement)
        found = moved.mapInArrow(join, schema)
    else:
        found = _packed(joined.sparkSession, group, small).mapInArrow(PackedJoin(join), schema)
    # One call for all names: each column made from Python costs a millisecond. Metadata of columns go with them.
    return found.toDF(*joined.columns, *(output for view in group.views for _, output in view.features))


def _packed(spark: SparkSession, group: AsofGroup, small: SmallSpine) -> DataFrame:
    """The rows of a small spine, packed by task."""
    assert group.placement is not None
    tables, count = small.by_task(tuple(name for name, _ in group.keys), group.placement), group.placement.count
    # A chunk for each place, so that Spark gives each a partition; tasks come by falling cost.
    places = min(parallelism(spark), count)
    chunks = [[pack(tables[task]) for task in range(place, count, places)] for place in range(places)]
    return spark.createDataFrame(pa.table({"packed": pa.chunked_array(chunks, pa.binary())}))


def _placed(plain: DataFrame, keys: Sequence[tuple[Column, str]], time: Column, placement: Placement) -> DataFrame:
    """The spine's rows with their ``residue``, each in the partition of its task."""
    residue = F.coalesce(key_residue(keys, placement.modulus), F.lit(NO_RESIDUE)).alias("residue")
    spread = F.xxhash64(*(key for key, _ in keys), time)
    # As text: thousands of columns made one by one take seconds. Arrays are looked up from 0; NO_RESIDUE has no place there.
    share = F.expr(f"get({_array([sum(placement.shares[:number]) for number in range(placement.modulus)])}, residue)")
    if max(placement.shares) > 1:
        share += F.pmod(spread, F.expr(f"get({_array(placement.shares)}, residue)"))
    task = F.coalesce(F.get(F.expr(_array(placement.tasks)), share), F.pmod(spread, F.lit(placement.count)))
    return plain.select("*", residue).repartitionById(placement.count, task.cast("int"))


def _array(numbers: Sequence[int]) -> str:
    return f"array({', '.join(str(int(number)) for number in numbers)})"


def _scan(view: AsofView, files: Sequence[DataFile], fields: Sequence[StructField], at: Mapping[str, str]) -> Scan:
    """What a task is told of a view; ``fields`` has the types of its features."""
    assert view.layout is not None
    by_bucket: dict[int, list[DataFile]] = {}
    for file in files:
        by_bucket.setdefault(file.bucket, []).append(file)
    types = [to_arrow_type(field.dataType, timezone="UTC") for field in fields]
    return Scan(
        keys=tuple((at[spine_key], key) for spine_key, key in view.keys),
        event=view.event_time,
        created=view.created_time,
        features=tuple(zip((name for name, _ in view.features), types, strict=True)),
        ttl_micros=view.ttl // _MICROSECOND if view.ttl else None,
        buckets=view.layout.buckets,
        files={bucket: tuple(found) for bucket, found in by_bucket.items()},
    )
