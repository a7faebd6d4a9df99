"""The colocated join through Spark: the same contract as the window's, real feature tables, plans and shuffles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs.errors import InvalidError
from spark_fs.intervals import Interval
from spark_fs.offline.asof import AsofView, execute, plan_asof, spine_stats, why_not_arrow
from spark_fs.offline.colocated import NO_RESIDUE
from spark_fs.offline.compute import acceptable, settle
from spark_fs.offline.layout import DataFile, Layout, read_layout
from spark_fs.offline.placement import Placement
from spark_fs.offline.spine_stats import small_spine
from spark_fs.offline.tables import FeatureTable
from spark_fs.spec import Column, SourceSpec, ViewSpec
from spark_fs.types import Float64, Int32, Int64, String
from tests.asof_contract import SEED, frame, pit_cases, pit_failure, pit_values, random_failures

EVENT, CREATED = "event_timestamp", "created_timestamp"
NOON = 1_719_835_200_000_000  # 2024-07-01T12:00:00Z
TYPES = {"int": Int32, "bigint": Int64, "string": String, "double": Float64}
SOURCE = SourceSpec("s", "delta", EVENT, path="unused", created_timestamp_field=CREATED)


def spec(name: str, keys: Mapping[str, str], features: Mapping[str, str]) -> ViewSpec:
    def columns(of: Mapping[str, str]) -> tuple[Column, ...]:
        return tuple(Column(each, TYPES[type_]) for each, type_ in of.items())

    return ViewSpec("shop", name, 1, tuple(keys), columns(keys), columns(features), SOURCE)


def written(features: DataFrame, keys: Sequence[str], folder: Path, buckets: int) -> Layout:
    """The rows as a build would leave them: settled, bucketed, one sorted file a bucket."""
    types = dict(features.dtypes)
    values = {name: type_ for name, type_ in types.items() if name not in (*keys, EVENT, CREATED)}
    view = spec("v", {key: types[key] for key in keys}, values)
    rows = settle(view, features.where(acceptable(view)), buckets).toArrow()
    folder.mkdir(parents=True)
    files = []
    for bucket in pc.unique(rows["_bucket"]).to_pylist():
        mine = rows.filter(pc.equal(rows["_bucket"], bucket)).sort_by([(name, "ascending") for name in (*keys, EVENT, CREATED)])
        path = folder / f"{bucket}.parquet"
        pq.write_table(mine, path)
        files.append(DataFile(str(path), bucket, path.stat().st_size, mine.num_rows))
    return Layout(buckets, tuple(files))


@pytest.fixture(scope="module", params=["moved", "packed"])
def colocated(request: pytest.FixtureRequest, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A join with the signature of ``asof_join`` that goes by files; the checker of the contract takes it as it is.

    The spine is shuffled, or sent by the driver.
    """
    number = iter(range(10_000))

    def join(spine: DataFrame, features: DataFrame, on: Sequence[str], **arguments: Any) -> DataFrame:
        folder = tmp_path_factory.mktemp("tables") / str(next(number))
        asked = arguments.get("columns") or [name for name in features.columns if name not in (*on, EVENT, CREATED)]
        view = AsofView(
            name="features",
            keys=tuple((key, key) for key in on),
            features=tuple((name, arguments.get("prefix", "") + name) for name in asked),
            columns=tuple(features.dtypes),
            created_time=CREATED,
            ttl=arguments.get("ttl"),
            unique=True,
            layout=written(features, on, folder, 4),
        )
        known_at = arguments.get("known_at", False)
        small = None
        if request.param == "packed" and on:
            small = small_spine(spark.createDataFrame(spine.toArrow()), EVENT, [on])
            assert small is not None
        plan = plan_asof(
            [view],
            spine.dtypes,
            stats=small.stats if small else None,
            known_at=known_at,
            strategy="colocated",
            parallelism=2,
            small_spine=small is not None,
        )
        assert plan.groups[0].packed is (small is not None)
        return execute(plan, spine, {}, small)

    return join


@pytest.fixture(scope="module")
def found(spark: SparkSession, colocated: Any) -> dict[str, list[list[Any]]]:
    return pit_values(spark, colocated)


@pytest.mark.parametrize("case", pit_cases(), ids=lambda case: str(case["name"]))
def test_written_case(found: dict[str, list[list[Any]]], case: dict[str, Any]) -> None:
    """Each written case holds; the session's time zone is not UTC."""
    assert pit_failure(case, found[case["name"]]) == ""


@pytest.mark.parametrize("session_zone", ["Asia/Kolkata"], indirect=True)
def test_random_cases_agree_with_the_oracle(spark: SparkSession, colocated: Any, session_zone: str) -> None:
    """200 cases under eight rules go through Spark; thousands more go through the task alone, in tests/property."""
    assert random_failures(spark, colocated, SEED, 200)[:3] == []


DAY = timedelta(days=1)
START = datetime(2024, 7, 1, tzinfo=timezone.utc)


def build(table: FeatureTable, rows: list[dict[str, Any]], day: int, number: int, buckets: int = 4) -> None:
    """One build of one day, as ``build_interval`` commits it."""
    types = {column.name: column.type.spark for column in (*table.view.keys, *table.view.features)}
    features = frame(table.spark, rows, {**types, EVENT: "timestamp", CREATED: "timestamp"})
    table.create(buckets)
    start, columns = START + day * DAY, [*table.view.key_names, EVENT, CREATED, *table.view.feature_names]
    table.replace(features.select(*columns), Interval(start, start + DAY), number)


def row(id_: int, day: int, hour: int, value: int, **more: Any) -> dict[str, Any]:
    micros = int((START + day * DAY + timedelta(hours=hour)).timestamp()) * 1_000_000
    return {"id": id_, EVENT: micros, CREATED: micros, "value": value, **more}


@pytest.fixture(scope="module")
def table(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureTable]:
    """Three builds of a day each: three files in every bucket."""
    path = str(tmp_path_factory.mktemp("daily") / "v1")
    made = FeatureTable(spark, path, spec("spend", {"id": "bigint"}, {"value": "bigint"}))
    for day in range(3):
        build(made, [row(n, day, hour, 1000 * day + 100 * hour + n) for n in range(40) for hour in (1, 9)], day, day + 1)
    return made


def view_of(table: FeatureTable, version: int | None = None, **wanted: Any) -> AsofView:
    _, layout, why = read_layout(table.path, table.version() if version is None else version)
    assert layout, why
    columns = [(column.name, column.type.spark) for column in (*table.view.keys, *table.view.features)]
    settings: dict[str, Any] = {
        "name": table.view.name,
        "keys": tuple((key, key) for key in table.view.key_names),
        "features": tuple((name, f"{table.view.name}_{name}") for name in table.view.feature_names),
        "columns": (*columns, (EVENT, "timestamp"), (CREATED, "timestamp")),
        "created_time": CREATED,
        "unique": True,
        "layout": layout,
    }
    return AsofView(**{**settings, **wanted})


def spine_of(spark: SparkSession, rows: list[dict[str, Any]], **types: str) -> DataFrame:
    return frame(spark, rows, {"id": "bigint", EVENT: "timestamp", "row": "int", **types})


def asked(days: float, many: int = 42) -> list[dict[str, Any]]:
    micros = int((START + days * DAY).timestamp()) * 1_000_000
    return [{"id": n, EVENT: micros, "row": n} for n in range(many)]


def test_a_pinned_version_is_read_whatever_comes_after(spark: SparkSession, table: FeatureTable) -> None:
    """Files added, replaced or put together by OPTIMIZE after the version was pinned change nothing; both strategies agree."""
    pinned = table.version()
    spine = spine_of(spark, asked(2.2))
    plan = plan_asof([view_of(table, pinned)], spine.dtypes, stats=spine_stats(spine, EVENT, residues=[("id",)]))
    joined = execute(plan, spine, {})
    before = sorted(tuple(each) for each in joined.collect())
    assert [value for *_, value in before][:2] == [2100, 2101]
    build(table, [row(n, 2, 2, -1) for n in range(40)], 2, 4)
    spark.sql(f"OPTIMIZE delta.`{table.path}`")
    assert sorted(tuple(each) for each in joined.collect()) == before
    newest = plan_asof([view_of(table)], spine.dtypes, stats=spine_stats(spine, EVENT, residues=[("id",)]))
    window = plan_asof([view_of(table)], spine.dtypes, strategy="window")
    after = sorted(tuple(each) for each in execute(newest, spine, {}).collect())
    assert after == sorted(tuple(each) for each in execute(window, spine, {"spend": table.read()}).collect())
    assert [value for *_, value in after][:2] == [-1, -1]


def test_files_are_pruned_by_time_and_the_plan_says_so(spark: SparkSession, table: FeatureTable) -> None:
    """Days after the spine's last time, and with a ttl those before its first, are not read."""
    view = view_of(table, 3)
    spine = spine_of(spark, asked(1.2))
    stats = spine_stats(spine, EVENT, residues=[("id",)])
    assert (stats.rows, sum(stats.residues["id",])) == (42, 42)
    for ttl, days in ((None, 2), (timedelta(hours=5), 1)):
        plan = plan_asof([view_of(table, 3, ttl=ttl)], spine.dtypes, stats=stats)
        body = plan.to_json()["groups"][0]["views"][0]
        assert (body["files"], body["rows"]) == ({"all": 12, "read": 4 * days}, {"all": 240, "read": 80 * days})
        assert 0 < body["bytes"]["read"] < body["bytes"]["all"]
        assert f"files: {4 * days} of 12" in str(plan)
        found = {each["row"]: each["spend_value"] for each in execute(plan, spine, {}).collect()}
        assert (found[0], found[39], found[41]) == (1100, 1139, None)
    assert view.layout is not None
    assert {file.bucket for file in view.layout.files} == {0, 1, 2, 3}


def test_the_spine_is_shuffled_once_and_features_never(spark: SparkSession, table: FeatureTable) -> None:
    """Two views of equal keys and one without keys: one exchange in the plan, and no scan of the tables."""
    path = table.path + "_all"
    everywhere = FeatureTable(spark, path, spec("rate", {}, {"value": "bigint"}))
    build(everywhere, [row(0, 0, 3, 7)], 0, 1, buckets=8)
    views = [view_of(table, 3), view_of(table, 3, name="again", features=(("value", "again"),)), view_of(everywhere)]
    spine = spine_of(spark, [*asked(1.5, 3), {"id": None, EVENT: asked(1.5)[0][EVENT], "row": 9}])
    plan = plan_asof(views, spine.dtypes, stats=spine_stats(spine, EVENT, residues=[("id",)]))
    assert [(group.strategy, group.shuffles, len(group.views)) for group in plan.groups] == [("colocated", 1, 3)]
    joined = execute(plan, spine, {})
    text = joined._jdf.queryExecution().executedPlan().toString()
    assert (text.count("Exchange"), text.count("MapInArrow"), text.count("FileScan")) == (1, 1, 0)
    assert sorted(tuple(each)[2:] for each in joined.collect()) == [
        (0, 1900, 1900, 7), (1, 1901, 1901, 7), (2, 1902, 1902, 7), (9, None, None, 7),
    ]  # fmt: skip
    alone = plan_asof([view_of(everywhere)], spine.dtypes)
    assert (alone.groups[0].shuffles, "Exchange" in str(execute(alone, spine, {})._jdf.queryExecution())) == (0, False)


def test_the_spine_keeps_columns_of_all_kinds(spark: SparkSession, table: FeatureTable) -> None:
    """Nested columns, maps and local times pass through untouched, whatever they are called."""
    spine = spine_of(spark, asked(1.5, 5)).select(
        "*",
        F.create_map(F.lit("k"), F.col("row")).alias("residue"),
        F.struct(F.array(F.col("row")), F.lit(None).cast("decimal(9,2)")).alias("value0"),
        F.lit("2024-01-01 00:00:00").cast("timestamp_ntz").alias("a.b`c"),
        F.expr("interval 3 days").cast("interval day").alias("span"),
    )
    joined = execute(plan_asof([view_of(table, 3)], spine.dtypes), spine, {})
    assert joined.dtypes == [*spine.dtypes, ("spend_value", "bigint")]
    assert sorted(map(repr, joined.drop("spend_value").collect())) == sorted(map(repr, spine.collect()))


def test_a_spine_that_arrow_cannot_carry_is_joined_by_the_window(spark: SparkSession, table: FeatureTable) -> None:
    """Said in the plan; asked for by name, colocated is refused."""
    spine = spine_of(spark, asked(1.5, 2)).withColumn("months", F.expr("make_interval(0, 1)"))
    assert why_not_arrow(spine_of(spark, asked(1.5, 2))) == ""
    why = why_not_arrow(spine)
    plan = plan_asof([view_of(table, 3)], spine.dtypes, spine_obstacle=why)
    assert (plan.groups[0].strategy, "Arrow" in plan.groups[0].reasons[0]) == ("window", True)
    assert execute(plan, spine, {"spend": table.read(3)}).count() == 2
    with pytest.raises(InvalidError) as refused:
        plan_asof([view_of(table, 3)], spine.dtypes, spine_obstacle=why, strategy="colocated")
    assert refused.value.problems[0].code == "SFS-513"


def test_tables_that_others_must_read_are_left_to_spark(spark: SparkSession, table: FeatureTable) -> None:
    """A table with deletion vectors, or by a scheme that Arrow cannot open, has no layout, and the reason is said."""
    path = table.path + "_vectors"
    spark.range(3).write.format("delta").option("delta.enableDeletionVectors", "true").save(path)
    _, layout, why = read_layout(path, 0)
    assert layout is None
    assert "deletionVectors" in why
    _, layout, why = read_layout("gopher://host/table", 0)
    assert layout is None
    assert "gopher" in why


def test_hot_keys_are_split_and_stay_exact(spark: SparkSession, tmp_path: Path) -> None:
    """Half of the spine has one key: its residue goes to several tasks, and each row finds what it should."""
    made = FeatureTable(spark, str(tmp_path / "v1"), spec("hot", {"id": "bigint"}, {"value": "bigint"}))
    build(made, [row(n, 0, hour, 100 * hour + n) for n in range(16) for hour in range(24)], 0, 1, buckets=16)
    base = int(START.timestamp()) * 1_000_000
    spine = spark.range(400_000).select(
        F.when(F.col("id") % 2 == 0, F.lit(3)).otherwise(F.col("id") % 16).cast("bigint").alias("id"),
        F.timestamp_micros(F.lit(base) + (F.col("id") % 24) * 3_600_000_000).alias(EVENT),
        (F.col("id") % 24).alias("hour"),
    )
    plan = plan_asof([view_of(made)], spine.dtypes, stats=spine_stats(spine, EVENT, residues=[("id",)]), parallelism=8)
    placement = plan.groups[0].placement
    assert placement is not None
    assert max(placement.shares) > 1
    joined = execute(plan, spine, {})
    wrong = joined.where(~F.col("hot_value").eqNullSafe(100 * F.col("hour") + F.col("id")))
    assert (joined.count(), wrong.count()) == (400_000, 0)
    tasks = joined.where("id = 3").select(F.spark_partition_id().alias("task")).distinct().count()
    assert tasks >= max(placement.shares) // 2 > 1


def test_bounds_of_files_hold_microseconds(spark: SparkSession, tmp_path: Path) -> None:
    """Delta's log has only milliseconds: a row in the last microsecond of one is within the bounds, and is found."""
    made = FeatureTable(spark, str(tmp_path / "v1"), spec("fine", {"id": "bigint"}, {"value": "bigint"}))
    late = {**row(1, 0, 3, 5)}
    late[EVENT] += 999_999
    build(made, [late], 0, 1, buckets=1)
    view = view_of(made)
    assert view.layout is not None
    assert view.layout.files[0].first is not None
    assert view.layout.files[0].first <= late[EVENT] <= (view.layout.files[0].last or 0)
    spine = spine_of(spark, [{"id": 1, EVENT: late[EVENT] + n, "row": n} for n in (-1, 0, 1)])
    for ttl in (None, timedelta(microseconds=1)):
        plan = plan_asof([view_of(made, ttl=ttl)], spine.dtypes, stats=spine_stats(spine, EVENT, residues=[("id",)]))
        assert [value for *_, value in sorted(map(tuple, execute(plan, spine, {}).collect()), key=str)].count(5) == 2


# ---- a small spine, read by the driver


def test_a_small_spine_is_read_once_and_counted_as_in_a_job(spark: SparkSession) -> None:
    """Rows, times, nulls and residues are those of the counting job, for several tuples of keys; also without any row."""
    rows = [(n % 7 if n % 5 else None, str(n % 3), START + timedelta(hours=n) if n % 4 else None) for n in range(100)]
    schema = f"id bigint, name string, {EVENT} timestamp"
    tuples = [("id",), ("name", "id")]
    for chosen in (rows, rows[:1], []):
        spine = spark.createDataFrame(spark.createDataFrame(chosen, schema).toArrow())
        small = small_spine(spine, EVENT, tuples)
        assert small is not None
        assert small.stats == spine_stats(spine, EVENT, residues=tuples)
        for names in tuples:
            placement = Placement(4, (1, 3, 1, 2), (2, 0, 1, 2, 2, 1, 0), 3)
            tables = small.by_task(names, placement)
            assert [table.num_rows for table in tables if table.num_rows > len(chosen)] == []
            assert sum(table.num_rows for table in tables) == len(chosen)
            allowed = {0: {2}, 1: {0, 1, 2}, 2: {2}, 3: {0, 1}, NO_RESIDUE: {0, 1, 2}}
            found = [(residue, task) for task, table in enumerate(tables) for residue in table["residue"].to_pylist()]
            assert all(task in allowed[residue] for residue, task in found)
            if len(chosen) == len(rows):
                assert len({task for residue, task in found if residue == NO_RESIDUE}) == 3


def test_a_spine_that_is_not_small_is_left_where_it_is(spark: SparkSession) -> None:
    """Rows multiplied, joined, of unknown size, large by the planner's word or in fact: the driver does not keep them."""
    ids = spark.range(10).selectExpr("id", f"timestamp_micros(id) AS {EVENT}")
    assert small_spine(ids, EVENT, [("id",)]) is not None
    assert small_spine(ids.selectExpr("explode(sequence(0L, 1000L)) AS id", EVENT), EVENT, [("id",)]) is None
    assert small_spine(ids.crossJoin(spark.range(3).toDF("n")), EVENT, [("id",)]) is None
    assert small_spine(spark.createDataFrame(ids.rdd, ids.schema), EVENT, [("id",)]) is None
    assert small_spine(spark.range(10**7).selectExpr("id", f"timestamp_micros(id) AS {EVENT}"), EVENT, [("id",)]) is None
    wide = ids.selectExpr("id", EVENT, "repeat('x', 10000000) AS text")
    assert small_spine(wide, EVENT, [("id",)]) is None


def test_the_plan_says_who_moves_a_small_spine(table: FeatureTable, spark: SparkSession) -> None:
    """No shuffle for the first step; what is joined after it moves as ever."""
    views = [view_of(table), view_of(table, name="again", keys=(("other", "id"),), features=(("value", "again"),))]
    spine = [("id", "bigint"), ("other", "bigint"), (EVENT, "timestamp")]
    plan = plan_asof(views, spine, small_spine=True)
    assert [(group.packed, group.shuffles) for group in plan.groups] == [(True, 0), (False, 1)]
    assert "the driver has read it and sends it to 4 tasks" in str(plan)
    assert plan.to_json()["shuffles"] == 1
    assert not plan_asof([view_of(table, layout=None, obstacle="closed")], spine, small_spine=True).groups[0].packed


@pytest.mark.parametrize("threshold", ["0", "48MB"])
def test_packed_rows_are_spread_over_all_places(table: FeatureTable, spark: SparkSession, threshold: str) -> None:
    """Whether Spark keeps them as rows or as Arrow batches."""
    setting = "spark.sql.execution.arrow.localRelationThreshold"
    before = spark.conf.get(setting)
    spine = spark.range(100).selectExpr("id", f"timestamp_micros({NOON}L) + make_interval(0, 0, 0, 9) AS {EVENT}")
    small = small_spine(spine, EVENT, [("id",)])
    assert small is not None
    plan = plan_asof([view_of(table)], spine.dtypes, stats=small.stats, small_spine=True, parallelism=2)
    assert plan.groups[0].packed
    try:
        spark.conf.set(setting, threshold)
        joined = execute(plan, spine, {}, small)
        counts = [row["count"] for row in joined.groupBy(F.spark_partition_id()).count().collect()]
    finally:
        spark.conf.set(setting, before)
    assert (len(counts), sum(counts)) == (2, 100)


def test_a_join_of_many_tasks_is_not_sent_by_the_driver(table: FeatureTable) -> None:
    """A cluster that starts small is to see them all."""
    spine, view = [("id", "bigint"), (EVENT, "timestamp")], view_of(table)
    for size, packed in ((1 << 20, True), (1 << 30, False)):
        files = tuple(DataFile(f"{bucket}.parquet", bucket, size, 1000) for bucket in range(64))
        plan = plan_asof([replace(view, layout=Layout(64, files))], spine, small_spine=True, parallelism=2)
        assert (plan.groups[0].packed, plan.groups[0].shuffles) == (packed, 0 if packed else 1)
