"""The written point-in-time cases, the borders of ``asof_join`` and the ways it can be used."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from spark_fs.errors import InvalidError
from spark_fs.offline.asof import AsofView, asof_join, execute, plan_asof, spine_stats
from tests.asof_contract import ZONES, frame, pit_cases, pit_failure, pit_values

NOON = 1_719_835_200_000_000  # 2024-07-01T12:00:00Z
SPINE = {"id": "bigint", "event_timestamp": "timestamp"}
FEATURES = {"id": "bigint", "event_timestamp": "timestamp", "value": "bigint"}


@pytest.fixture(scope="module", params=ZONES)
def found(spark: SparkSession, request: pytest.FixtureRequest) -> Iterator[dict[str, list[list[Any]]]]:
    before = str(spark.conf.get("spark.sql.session.timeZone"))
    spark.conf.set("spark.sql.session.timeZone", request.param)
    yield pit_values(spark, asof_join)
    spark.conf.set("spark.sql.session.timeZone", before)


@pytest.mark.parametrize("case", pit_cases(), ids=lambda case: str(case["name"]))
def test_written_case(found: dict[str, list[list[Any]]], case: dict[str, Any]) -> None:
    """Each written case holds, under every session time zone."""
    assert pit_failure(case, found[case["name"]]) == ""


def test_spine_columns_come_first_untouched_and_in_order(spark: SparkSession) -> None:
    """The spine's columns keep names, order, types, values and metadata; the features follow with the prefix."""
    spine = frame(
        spark,
        [{"z": "keep", "id": 1, "event_timestamp": NOON, "list": [1, 2]}],
        {"z": "string", "id": "bigint", "event_timestamp": "timestamp", "list": "array<int>"},
    )
    spine = spine.withMetadata("z", {"comment": "label"})
    features = frame(spark, [{"id": 1, "event_timestamp": NOON, "value": 7}], FEATURES)
    joined = asof_join(spine, features, "id", prefix="f_")
    assert joined.dtypes == [*spine.dtypes, ("f_value", "bigint")]
    assert joined.schema["z"].metadata == {"comment": "label"}
    assert joined.drop("event_timestamp").collect() == [("keep", 1, [1, 2], 7)]


def test_names_may_hold_dots_spaces_and_backticks(spark: SparkSession) -> None:
    """No column name is ever read as code or as a path into a struct."""
    spine = frame(spark, [{"id": 1, "t": NOON}], {"id": "bigint", "t": "timestamp"}).toDF("user `id`", "t.at")
    features = frame(spark, [{"id": 1, "t": NOON, "value": 5}], {"id": "bigint", "t": "timestamp", "value": "bigint"})
    features = features.toDF("a.b`; DROP", "e t", "count(*)")
    joined = asof_join(spine, features, {"user `id`": "a.b`; DROP"}, spine_time="t.at", event_time="e t", prefix="`")
    assert joined.columns == ["user `id`", "t.at", "`count(*)"]
    assert joined.collect()[0][2] == 5


def test_own_names_inside_the_join_do_not_clash(spark: SparkSession) -> None:
    """Columns named like the join's own are carried like any other."""
    names = ["key0", "time", "side", "spine", "spread", "view0", "winner0", "c000001", "hash"]
    spine = frame(
        spark, [{"id": 1, "event_timestamp": NOON, **dict.fromkeys(names, 3)}], {**SPINE, **dict.fromkeys(names, "int")}
    )
    features = frame(
        spark,
        [{"id": 1, "event_timestamp": NOON, "created": 1, "event": 2}],
        {"id": "bigint", "event_timestamp": "timestamp", "created": "int", "event": "int"},
    )
    row = asof_join(spine, features, "id").drop("event_timestamp").collect()[0]
    assert tuple(row) == (1, *[3] * len(names), 1, 2)


@pytest.mark.parametrize("types", [("int", "bigint"), ("bigint", "smallint"), ("tinyint", "int")])
def test_integer_keys_of_other_width_match(spark: SparkSession, types: tuple[str, str]) -> None:
    """Integer keys are compared by value whatever their widths, and the spine keeps its own type."""
    left, right = types
    spine = frame(spark, [{"id": 7, "event_timestamp": NOON}], {**SPINE, "id": left})
    features = frame(spark, [{"id": 7, "event_timestamp": NOON, "value": 1}], {**FEATURES, "id": right})
    joined = asof_join(spine, features, "id")
    assert joined.collect()[0].value == 1
    assert joined.dtypes[0] == ("id", left)


def test_a_wide_key_is_not_cut_to_a_narrow_one(spark: SparkSession) -> None:
    """A bigint key beyond int matches no int key and raises nothing."""
    spine = frame(spark, [{"id": 1, "event_timestamp": NOON}], {**SPINE, "id": "int"})
    features = frame(spark, [{"id": 2**32 + 1, "event_timestamp": NOON, "value": 1}], FEATURES)
    assert asof_join(spine, features, "id").collect()[0].value is None


def test_all_problems_are_told_at_once(spark: SparkSession) -> None:
    """Wrong names, types and clashes come in one error, before any job."""
    spine = spark.createDataFrame([], "user_id string, event_timestamp timestamp_ntz, value int")
    features = spark.createDataFrame([], "user_id bigint, event_timestamp date, value int")
    with pytest.raises(InvalidError) as raised:
        asof_join(spine, features, ["user_id", "itm"], known_at=True, ttl=timedelta(days=-1))
    codes = [problem.code for problem in raised.value.problems]
    assert codes == ["SFS-504", "SFS-506", "SFS-504", "SFS-506", "SFS-505", "SFS-507", "SFS-508", "SFS-503"]


def test_map_columns_are_carried(spark: SparkSession) -> None:
    """A map column cannot be hashed; it is carried and takes no part in the tie-break."""
    spine = frame(spark, [{"id": 1, "event_timestamp": NOON}], SPINE)
    features = frame(spark, [{"id": 1, "event_timestamp": NOON, "value": 1}], FEATURES)
    features = features.withColumn("tags", F.create_map(F.lit("k"), F.lit("v")))
    assert asof_join(spine, features, "id").collect()[0].tags == {"k": "v"}


def test_more_than_a_hundred_columns(spark: SparkSession) -> None:
    """Wide spines and wide views join like narrow ones."""
    wide = [f"w{n}" for n in range(120)]
    spine = frame(spark, [{"id": 1, "event_timestamp": NOON}], SPINE).select(
        "*", *(F.lit(n).alias(f"s{n}") for n in range(120))
    )
    features = frame(spark, [{"id": 1, "event_timestamp": NOON}], SPINE).select(
        "*", *(F.lit(n).alias(name) for n, name in enumerate(wide))
    )
    row = asof_join(spine, features, "id").collect()[0]
    assert [row[name] for name in wide] == list(range(120))
    assert [row[f"s{n}"] for n in range(120)] == list(range(120))


def _three_views(spark: SparkSession, **wanted: Any) -> tuple[list[AsofView], dict[str, Any]]:
    """Two views by id (int and bigint keys, one with ttl) and one by shop, each with rows now and ten days ago."""
    old = NOON - 10 * 86_400_000_000
    frames = {
        name: frame(
            spark,
            [
                {key: 1, "event_timestamp": old, "value": 1},
                {key: 1, "event_timestamp": NOON, "value": 2},
                {key: None, "event_timestamp": old, "value": 3},
                {key: 9, "event_timestamp": old, "value": 4},
            ],
            {key: type_, "event_timestamp": "timestamp", "value": "bigint"},
        )
        for name, key, type_ in (("a", "id", "bigint"), ("b", "uid", "int"), ("c", "shop", "int"))
    }
    views = [
        AsofView(
            name=name,
            keys=((spine_key, key),),
            features=(("value", f"{name}_value"),),
            columns=tuple(frames[name].dtypes),
            ttl=ttl,
            unique=True,
            **wanted,
        )
        for name, spine_key, key, ttl in (
            ("c", "shop", "shop", None),
            ("a", "id", "id", timedelta(days=7)),
            ("b", "id", "uid", None),
        )
    ]
    return views, frames


def test_views_of_several_keys_come_in_the_order_asked_for(spark: SparkSession) -> None:
    """Views are joined by groups of equal keys, yet the columns come as asked; pruning changes no value."""
    views, frames = _three_views(spark)
    rows = [
        {"row": 0, "id": 1, "shop": 1, "event_timestamp": NOON - 1},
        {"row": 1, "id": 1, "shop": 9, "event_timestamp": NOON},
        {"row": 2, "id": None, "shop": None, "event_timestamp": NOON},
        {"row": 3, "id": 9, "shop": 1, "event_timestamp": None},
    ]
    spine = frame(spark, rows, {"row": "int", "id": "int", "shop": "bigint", "event_timestamp": "timestamp"})
    stats = spine_stats(spine, "event_timestamp", [("id",), ("shop",)])
    pruned = plan_asof(views, spine.dtypes, stats=stats)
    assert [group.semi_join for group in pruned.groups] == [True, True]
    for plan in (pruned, plan_asof(views, spine.dtypes)):
        joined = execute(plan, spine, frames)
        assert joined.columns == [*spine.columns, "c_value", "a_value", "b_value"]
        assert sorted(tuple(row) for row in joined.drop("event_timestamp", "id", "shop").collect()) == [
            (0, 1, None, 1),
            (1, 4, 2, 2),
            (2, None, None, None),
            (3, None, None, None),
        ]


def test_spine_stats_count_the_spine(spark: SparkSession) -> None:
    """Rows, rows without time, exact first and last instant, and distinct keys without nulls."""
    rows = [{"a": n % 3 if n else None, "b": n, "event_timestamp": NOON + n if n < 9 else None} for n in range(10)]
    spine = frame(spark, rows, {"a": "int", "b": "int", "event_timestamp": "timestamp"})
    stats = spine_stats(spine, "event_timestamp", [("a",), ("b", "a"), ()])
    assert (stats.rows, stats.null_times) == (10, 1)
    assert stats.first is not None
    assert stats.last is not None
    assert (stats.last - stats.first, stats.first.isoformat()) == (
        timedelta(microseconds=8),
        "2024-07-01T12:00:00+00:00",
    )
    assert stats.distinct_keys == {("a",): 3, ("a", "b"): 9}


def test_an_empty_spine_gives_an_empty_result(spark: SparkSession) -> None:
    """No rows in, no rows out, with and without statistics."""
    views, frames = _three_views(spark)
    spine = spark.createDataFrame([], "id bigint, shop int, event_timestamp timestamp")
    stats = spine_stats(spine, "event_timestamp", [("id",), ("shop",)])
    assert (stats.rows, stats.first, stats.last) == (0, None, None)
    for plan in (plan_asof(views, spine.dtypes, stats=stats), plan_asof(views, spine.dtypes)):
        assert execute(plan, spine, frames).collect() == []


def test_rows_with_null_keys_are_spread(spark: SparkSession) -> None:
    """Spine rows that match nothing do not all land in one task."""
    spine = frame(spark, [{"id": None, "event_timestamp": NOON + n} for n in range(64)], SPINE).repartition(8)
    features = frame(spark, [{"id": 1, "event_timestamp": NOON, "value": 1}], FEATURES)
    spark.conf.set("spark.sql.adaptive.enabled", "false")  # it would put the small parts together again
    try:
        joined = asof_join(spine, features, "id")
        rows = joined.select("value", F.spark_partition_id().alias("task")).collect()
    finally:
        spark.conf.set("spark.sql.adaptive.enabled", "true")
    assert len(rows) == 64
    assert {row.value for row in rows} == {None}
    assert {row.task for row in rows} == {0, 1}


def test_views_of_equal_keys_share_one_shuffle(spark: SparkSession) -> None:
    """Two views by the same keys cost one exchange; no action runs while the join is built."""
    views, frames = _three_views(spark)
    spine = frame(spark, [{"id": 1, "event_timestamp": NOON}], {"id": "int", "event_timestamp": "timestamp"})
    same_keys = [view for view in views if view.name != "c"]
    joined = execute(plan_asof(same_keys, spine.dtypes), spine, frames)
    text = joined._jdf.queryExecution().sparkPlan().toString()
    executed = joined._jdf.queryExecution().executedPlan().toString()
    assert text.count("Window ") == 1
    assert executed.count("Exchange hashpartitioning") == 1


def test_only_needed_columns_and_rows_are_read(spark: SparkSession, tmp_path: Any) -> None:
    """Files are asked for the needed columns alone, with the time range and the null checks pushed down to them."""
    features = frame(spark, [{"id": 1, "event_timestamp": NOON, "value": 1}], FEATURES).withColumn("unused", F.lit("x"))
    features.write.parquet(str(tmp_path / "features"))
    stored = spark.read.parquet(str(tmp_path / "features"))
    view = AsofView("v", (("id", "id"),), (("value", "value"),), tuple(stored.dtypes), ttl=timedelta(days=1), unique=True)
    spine = frame(spark, [{"id": 1, "event_timestamp": NOON}], SPINE)
    stats = spine_stats(spine, "event_timestamp", [("id",)])
    joined = execute(plan_asof([view], spine.dtypes, stats=stats), spine, {"v": stored})
    text = joined._jdf.queryExecution().executedPlan().toString()
    assert "unused" not in text
    for pushed in ("IsNotNull(id)", "GreaterThanOrEqual(event_timestamp", "LessThanOrEqual(event_timestamp"):
        assert pushed in text
    assert joined.collect()[0].value == 1
