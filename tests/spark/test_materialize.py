"""From feature tables to the online store: what is read online is what training would have seen at that moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from spark_fs import FeatureStore
from spark_fs.audit import STATUSES
from spark_fs.build import build_interval
from spark_fs.dispatch import publish_files, publish_rows
from spark_fs.errors import ConflictError, ExitCode, InvalidError, PartlyDoneError, SparkFSError, UnavailableError
from spark_fs.files import feature_table_path
from spark_fs.intervals import BEGINNING, Interval
from spark_fs.ledger import Published
from spark_fs.materialize import MaterializeResult, materialize_view
from spark_fs.offline.tables import FeatureTable
from spark_fs.online import executor, server
from spark_fs.online.capacity import Demand, check_capacity
from spark_fs.online.codec import key_prefix, redis_key
from spark_fs.online.redis_store import OnlineTarget, write_batches
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec
from tests.online.servers import batch, free_port, redis_process, view_of
from tests.project import open_project, write

UTC = timezone.utc
STATUSES_OF_FEATURES = [status for status in STATUSES if status != "extra"]
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
#: The end of all intervals: after every row, and not in the future, so that nothing is built on the way.
END = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
START = END - 30 * DAY

SPEND = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = FileSource("payments", path="data/payments", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("amount", Int64)], payments)
"""
AMOUNTS = pa.schema([("user_id", pa.int64()), ("at", pa.timestamp("us", tz="UTC")), ("amount", pa.int64())])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a project whose embedded server is stopped afterwards."""
    yield tmp_path
    server.stop(tmp_path / ".spark_fs")


@pytest.fixture
def fs(folder: Path, spark: SparkSession) -> FeatureStore:
    """An applied project with the one view ``spend`` over data/payments."""
    store = open_project(folder, SPEND, spark)
    store.apply()
    return store


def put(folder: Path, rows: Sequence[tuple[Any, ...]], schema: pa.Schema = AMOUNTS, source: str = "payments") -> None:
    """Make ``rows`` all that the source holds."""
    write(folder / "data" / source / "_SUCCESS", "")
    columns = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), schema, strict=True)]
    pq.write_table(pa.table(columns, schema=schema), folder / "data" / source / "part.parquet")


def online(fs: FeatureStore, users: Sequence[int], feature: str = "spend:amount") -> list[Any]:
    """The published values of the users; where there is none, the status that says why."""
    name = feature.partition(":")[2]
    response = fs.get_online_features([feature], {"user_id": list(users)})
    pairs = zip(response.to_dict()[name], response.statuses[name], strict=True)
    return [value if status == "PRESENT" else status for value, status in pairs]


def counts(results: Sequence[MaterializeResult]) -> tuple[int, ...]:
    """rows_read, applied, equal, stale, expired of the only view."""
    (result,) = results
    return result.rows_read, result.applied, result.equal, result.stale, result.expired


# ---- what is read online


EVERY_TYPE = """
    shelf = Entity("shelf", [Field("shop", String), Field("sku", Int64), Field("day", Date)])
    facts = FileSource("facts", path="data/facts", timestamp_field="at", created_timestamp_field="known")
    every = FeatureView("every", shelf, [
        Field("bool", Bool), Field("int32", Int32), Field("int64", Int64), Field("float32", Float32),
        Field("float64", Float64), Field("string", String), Field("bytes", Bytes), Field("time", Timestamp),
        Field("date", Date), Field("decimal", Decimal(38, 9)), Field("words", Array(String)),
        Field("numbers", Array(Int64)), Field("vector", Embedding(3)),
    ], facts)
    rates = FileSource("rates", path="data/rates", timestamp_field="at")
    rate = FeatureView("rate", [], [Field("euro", Decimal(6, 4))], rates)
"""
INSTANT = pa.timestamp("us", tz="UTC")
FACTS = pa.schema(
    [
        ("shop", pa.string()), ("sku", pa.int64()), ("day", pa.date32()), ("at", INSTANT), ("known", INSTANT),
        ("bool", pa.bool_()), ("int32", pa.int32()), ("int64", pa.int64()), ("float32", pa.float32()),
        ("float64", pa.float64()), ("string", pa.string()), ("bytes", pa.binary()), ("time", INSTANT),
        ("date", pa.date32()), ("decimal", pa.decimal128(38, 9)), ("words", pa.list_(pa.string())),
        ("numbers", pa.list_(pa.int64())), ("vector", pa.list_(pa.float32())),
    ]
)  # fmt: skip
TODAY, AT = END.date(), END - DAY
FULL = (
    True, -(2**31), 2**63 - 1, 1.5, -0.1, "naïve – 🙂", b"\x00\xff",
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), date(1900, 1, 1),
    Decimal("-12345678901234567890123456789.000000001"), ["a", None, ""], [2**53 + 1, None], [0.5, -1.0, 2.0],
)  # fmt: skip
EMPTY = (False, 0, 0, 0.0, 0.0, "", b"", datetime(2038, 1, 1, tzinfo=UTC), date(2100, 1, 1), Decimal(0), [], [], [0.0] * 3)
NULLS = (None,) * 13


def test_every_type_reads_online_as_the_join_at_the_same_time_gives_it(folder: Path, spark: SparkSession) -> None:
    """For each key, of whatever type and number, the online row is the row of the as-of join at the time of reading."""
    fs = open_project(folder, EVERY_TYPE, spark)
    fs.apply()
    rows = [
        ("1:2", 3, TODAY, AT, None, *EMPTY),
        ("1:2", 3, TODAY, AT, AT, *FULL),  # known later at the same event time: this one counts
        ("1:2", 3, TODAY, AT - HOUR, END, *EMPTY),
        ("1", 23, TODAY, AT, AT, *EMPTY),  # as joined text its key would be like that of the first
        ("", -1, TODAY, AT - DAY, AT, *FULL),
        ("", -1, TODAY, AT, AT, *NULLS),  # a newer row of nulls is not filled from the older one
    ]
    put(folder, rows, FACTS, "facts")
    rates = pa.schema([("at", INSTANT), ("euro", pa.decimal128(6, 4))])
    put(folder, [(AT, Decimal("1.0001")), (AT + HOUR, Decimal("1.2345"))], rates, "rates")
    fs.materialize_incremental(END)

    keys = [("1:2", 3), ("1", 23), ("", -1), ("absent", 0)]
    spine = [(shop, sku, TODAY, datetime.now(UTC)) for shop, sku in keys]
    features = [f"every:{field.name}" for field in FACTS][5:]
    features = [*features, "rate:euro"]
    frame = spark.createDataFrame(spine, "shop string, sku bigint, day date, event_timestamp timestamp")
    joined = {(row["shop"], row["sku"]): row for row in fs.get_historical_features(frame, features).to_arrow().to_pylist()}
    entities = {"shop": [k[0] for k in keys], "sku": [k[1] for k in keys], "day": [TODAY] * 4}
    response = fs.get_online_features(features, entities)

    names, read = response.feature_names, response.to_dict()
    answered = [tuple(read[name][n] for name in names) for n in range(len(keys))]
    assert answered == [tuple(joined[key][name] for name in names) for key in keys]
    euro = Decimal("1.2345")
    assert answered == [(*FULL, euro), (*EMPTY, euro), (*NULLS, euro), (*NULLS, euro)]
    for name in names[:-1]:
        assert response.statuses[name] == ["PRESENT", "PRESENT", "NULL_VALUE", "NOT_FOUND"]
    assert response.event_timestamps["bool"] == [AT, AT, AT, None]
    assert fs.get_online_features(["rate:euro"], [{}]).to_dict() == {"euro": [euro]}


def test_age_is_judged_when_a_value_is_read(folder: Path, spark: SparkSession) -> None:
    """A row past its ttl is not published; one that outlives a ttl shortened later is OUTSIDE_MAX_AGE, as in the join."""

    def project(ttl: str) -> FeatureStore:
        return open_project(folder, SPEND.replace("payments)", f"payments, ttl={ttl})"), spark)

    fs = project("timedelta(days=2)")
    fs.apply()
    put(folder, [(1, END - DAY, 10), (2, END - 3 * DAY, 20)])
    assert counts(fs.materialize_incremental(END)) == (2, 1, 0, 0, 1)
    assert online(fs, [1, 2]) == [10, "NOT_FOUND"]
    shorter = project("timedelta(hours=2)")
    shorter.apply()
    assert online(shorter, [1, 2]) == ["OUTSIDE_MAX_AGE", "NOT_FOUND"]
    frame = spark.createDataFrame([(1, datetime.now(UTC))], "user_id bigint, event_timestamp timestamp")
    assert shorter.get_historical_features(frame, ["spend:amount"]).to_arrow()["amount"].to_pylist() == [None]


# ---- what a run does


def test_counts_say_what_was_read_and_what_became_of_it(fs: FeatureStore, folder: Path) -> None:
    """A first run applies one row a key; the next sends nothing; the interval once more finds all equal."""
    put(folder, [(user, START + hour * HOUR, user * 100 + hour) for user in range(5) for hour in range(4)])
    (first,) = fs.materialize_incremental(END)
    assert (first.view, first.rows_read, first.applied, first.equal, first.stale, first.expired) == ("spend@1", 20, 5, 0, 0, 0)
    with redis.Redis.from_url(fs.online_url()) as client:
        stored = {key: client.get(key) for key in client.scan_iter("shop:spend@1:{*")}
    assert first.bytes == sum(len(key) + len(value) for key, value in stored.items())

    (again,) = fs.materialize_incremental(END)
    assert (*counts([again]), again.bytes) == (0, 0, 0, 0, 0, 0)
    (same,) = fs.materialize(START, END)
    assert (*counts([same]), same.bytes) == (0, 0, 0, 0, 0, 0)
    (whole,) = fs.materialize(START, END, everything=True)
    assert (*counts([whole]), whole.bytes) == (20, 0, 5, 0, 0, first.bytes)
    assert online(fs, range(5)) == [3, 103, 203, 303, 403]
    assert [run["state"] for run in fs.registry.runs() if run["kind"] == "materialize"] == ["done"] * 4


def test_late_rows_and_corrections_get_through(fs: FeatureStore, folder: Path) -> None:
    """Incremental goes by what builds wrote, not by event time: an old row and a value corrected in place are published."""
    old, new = START + HOUR, START + DAY
    put(folder, [(1, old, 10), (1, new, 11), (2, new, 20)])
    fs.materialize_incremental(END)
    put(folder, [(1, old, 10), (1, new, 12), (2, new, 20), (3, old, 30)])
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)
    fs.build(start=START, end=START + 2 * DAY)
    result = counts(fs.materialize_incremental(END))
    # Two of the four rebuilt rows are as they were.
    assert result == (2, 2, 0, 0, 0)
    assert online(fs, [1, 2, 3]) == [12, 20, 30]


def test_an_old_backfill_never_replaces_newer_values(fs: FeatureStore, folder: Path) -> None:
    """Publishing an earlier interval leaves newer values alone, counts them as stale, and adds keys seen only there."""
    middle = START + 2 * DAY
    put(folder, [(1, START, 10), (1, END - HOUR, 11), (2, START, 20)])
    assert counts(fs.materialize(middle, END)) == (1, 1, 0, 0, 0)
    fs.build(start=START, end=middle)  # a later build of old rows is still of old rows
    assert counts(fs.materialize(START, middle)) == (2, 1, 0, 1, 0)
    assert online(fs, [1, 2]) == [11, 20]


def test_materialize_builds_what_is_missing_first(fs: FeatureStore, folder: Path) -> None:
    """Rows that no build has covered are built up to the end, and rows from the end on stay unpublished."""
    middle = START + DAY
    put(folder, [(1, START, 10), (1, middle, 11)])
    assert fs.missing(end=middle)["spend@1"]
    fs.materialize(START, middle)
    assert fs.missing(end=middle)["spend@1"] == []
    assert fs.missing(end=END)["spend@1"] == [Interval(middle, END)]
    assert online(fs, [1]) == [10]
    fs.materialize_incremental(middle + HOUR)
    assert online(fs, [1]) == [11]


def test_a_pinned_older_version_is_built_and_published_too(folder: Path, spark: SparkSession) -> None:
    """A service keeps its version of a view: what is missing of it is built, although the view has moved on."""
    pinned = SPEND + "    model = FeatureService('model', [spend])\n"
    open_project(folder, pinned, spark).apply()
    changed = SPEND.replace("payments)", "payments, transformation='SELECT user_id, at, -amount AS amount FROM {source}')")
    fs = open_project(folder, changed + "    model = FeatureService('model', [spend])\n", spark)
    fs.apply()
    put(folder, [(1, START, 10)])
    assert {result.view for result in fs.materialize_incremental(END)} == {"spend@1", "spend@2"}
    assert online(fs, [1], "spend@1:amount") == [10]
    assert online(fs, [1], "spend@2:amount") == [-10]


# ---- changes of the table that are not builds, and builds side by side


def test_optimize_sends_nothing_and_a_foreign_write_is_looked_at(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """Compacting files makes no row new; after a write that is no build, every row is looked at again."""
    put(folder, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)
    put(folder, [(1, START, 10), (2, START, 20), (3, START + DAY, 30)])
    fs.build(start=START + HOUR, end=END)
    assert counts(fs.materialize_incremental(END)) == (1, 1, 0, 0, 0)

    path = feature_table_path(fs.environment.offline_root, fs.registry.state().require_view("spend"))
    spark.sql(f"OPTIMIZE delta.`{path}`")
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)
    row = spark.read.format("delta").load(path).where("user_id = 1")
    foreign = row.withColumn("event_timestamp", F.col("event_timestamp") + F.expr("INTERVAL 1 HOUR"))
    foreign.withColumn("amount", F.lit(11).cast("bigint")).write.format("delta").mode("append").save(path)
    assert counts(fs.materialize_incremental(END)) == (1, 1, 0, 0, 0)
    assert online(fs, [1, 2, 3]) == [11, 20, 30]
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)


class PausedRegistry(Registry):
    """A registry whose next build, once it has its number, waits while ``meanwhile`` happens."""

    meanwhile: Any

    def begin_build(self, view: ViewSpec, interval: Interval) -> int:
        number = super().begin_build(view, interval)
        self.meanwhile()
        return number


def test_a_build_that_commits_after_a_later_one_is_not_missed(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """Build 2 begins, build 3 begins, commits and is published, build 2 commits: the next run publishes build 2."""
    put(folder, [(1, START, 10), (2, START + DAY, 20)])
    fs.materialize_incremental(END)
    put(folder, [(1, START, 11), (2, START + DAY, 21)])

    def overtake() -> None:
        (later,) = fs.build(start=START + DAY, end=END)
        assert later.build == 3
        assert counts(fs.materialize_incremental(END)) == (1, 1, 0, 0, 0)
        assert online(fs, [1, 2]) == [10, 21]

    view = fs.registry.state().require_view("spend")
    registry = PausedRegistry(fs.environment.registry_url, fs.project)
    registry.meanwhile = overtake
    table = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    source = spark.read.parquet(str(folder / "data" / "payments")).withColumnRenamed("at", "event_timestamp")
    frame = source.select("user_id", "event_timestamp", F.lit(None).cast("timestamp").alias("created_timestamp"), "amount")
    early = build_interval(registry, table, frame, Interval(START, START + DAY), buckets=2, latest=END)
    assert early.build == 2
    assert counts(fs.materialize_incremental(END)) == (1, 1, 0, 0, 0)
    assert online(fs, [1, 2]) == [11, 21]


def test_two_materializations_at_once_end_as_one(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """A backfill and an incremental run side by side, neither of which waits, leave the newest row of each key."""
    users = range(2_000)
    put(folder, [(user, START + (user * 7 + n) % 50 * HOUR, user * 10 + n) for user in users for n in range(3)])
    fs.build(end=END)
    view = fs.registry.state().require_view("spend")
    table = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    target, barrier = OnlineTarget.of(fs.online_url(), view), Barrier(2)

    def run(interval: Interval) -> MaterializeResult:
        registry = Registry(fs.environment.registry_url, fs.project)
        barrier.wait()
        return materialize_view(registry, table, target, interval)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, (Interval(START, START + DAY), Interval(BEGINNING, END))))
    assert all(result.rows_read > 0 for result in results)
    newest = [max(((user * 7 + n) % 50, user * 10 + n) for n in range(3))[1] for user in users]
    assert online(fs, users) == newest


def test_a_run_waits_for_another_of_the_same_view(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """It finds then that all is done; where the other takes too long it is told, and nothing is changed."""
    put(folder, [(1, START, 10)])
    fs.build(end=END)
    other, view = FeatureStore(folder, "test", spark=spark), fs.registry.state().require_view("spend")
    with ThreadPoolExecutor(1) as pool:
        with other.registry.ledger.held(view, "other", 0):
            waiting = pool.submit(fs.materialize_incremental, END)
            time.sleep(1)
            assert not waiting.done()
            assert online(fs, [1]) == ["NOT_FOUND"]
            materialize_view(other.registry, fs._offline.table(view), fs._target(view), Interval(BEGINNING, END))
        assert counts(waiting.result()) == (0, 0, 0, 0, 0)
    assert online(fs, [1]) == [10]


# ---- what is not true any more


def rebuilt(fs: FeatureStore, folder: Path, rows: Sequence[tuple[Any, ...]]) -> MaterializeResult:
    """The source holds just these rows; all is built again and what has changed published."""
    put(folder, rows)
    fs.build(start=START, end=END)
    (result,) = fs.materialize_incremental(END)
    return result


def test_a_row_that_is_gone_uncovers_the_one_before(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """Rows deleted at the source: the older one is served again, or none; late copies of what was sent cannot undo it."""
    old, new = START + HOUR, START + DAY
    put(folder, [(1, old, 10), (1, new, 11), (2, new, 20), (3, old, 30), (3, new, 31), (4, new, 40)])
    fs.materialize_incremental(END)
    view = fs.registry.state().require_view("spend")
    before = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    sent = before.read(before.version())

    result = rebuilt(fs, folder, [(1, old, 10), (3, new, 31), (4, new, 40)])
    # Of user 3 an older row is gone, which changes nothing online.
    assert (result.withdrawn, result.applied, result.rows_read) == (2, 0, 0)
    assert online(fs, [1, 2, 3, 4]) == [10, "NOT_FOUND", 31, 40]
    late, _ = publish_rows(view, sent, OnlineTarget.of(fs.online_url(), view))
    assert (late.fenced, late.stale, late.equal) == (2, 0, 2)
    assert online(fs, [1, 2, 3, 4]) == [10, "NOT_FOUND", 31, 40]

    result = rebuilt(fs, folder, [(1, old, 10), (1, new - HOUR, 12), (2, old, 21), (3, new, 31), (4, new, 40)])
    assert (result.withdrawn, result.applied) == (0, 2)
    assert online(fs, [1, 2, 3, 4]) == [12, 21, 31, 40]
    assert fs.registry.generation(view) == 2


def test_an_event_time_that_was_corrected_backwards_gets_through(fs: FeatureStore, folder: Path) -> None:
    """The row with the wrong, later time is gone, so the one with the right time counts, though it is older."""
    put(folder, [(1, START + 5 * HOUR, 10)])
    fs.materialize_incremental(END)
    assert rebuilt(fs, folder, [(1, START + 2 * HOUR, 11)]).withdrawn == 1
    assert online(fs, [1]) == [11]


def test_a_view_without_keys_may_lose_its_row(folder: Path, spark: SparkSession) -> None:
    """It has one entity; the row before is served, then none."""
    fs = open_project(folder, EVERY_TYPE, spark)
    fs.apply()
    schema = pa.schema([("at", INSTANT), ("euro", pa.decimal128(6, 4))])
    first, second = (START, Decimal("1.0001")), (START + HOUR, Decimal("1.2345"))

    def served(*rows: tuple[datetime, Decimal]) -> Decimal | None:
        put(folder, rows, schema, "rates") if rows else write_empty(folder, schema, "rates")
        fs.build(["rate"], start=START, end=END)
        fs.materialize_incremental(END, ["rate"])
        value: Decimal | None = fs.get_online_features(["rate:euro"], [{}]).to_dict()["euro"][0]
        return value

    assert [served(first, second), served(first), served()] == [second[1], first[1], None]


def write_empty(folder: Path, schema: pa.Schema, source: str) -> None:
    """Leave the source without a row."""
    pq.write_table(schema.empty_table(), folder / "data" / source / "part.parquet")


def test_older_values_replace_newer_ones_only_by_a_restatement(fs: FeatureStore, folder: Path) -> None:
    """It goes by the interval: keys without a row there stay as they are; what comes later counts as ever."""
    middle = START + DAY
    put(folder, [(1, START, 10), (1, middle, 11), (2, middle, 20)])
    fs.materialize_incremental(END)
    assert counts(fs.materialize(START, middle)) == (0, 0, 0, 0, 0)
    assert counts(fs.materialize(START, middle, everything=True)) == (1, 0, 0, 1, 0)
    assert online(fs, [1, 2]) == [11, 20]
    assert counts(fs.materialize(START, middle, restate=True)) == (1, 1, 0, 0, 0)
    assert online(fs, [1, 2]) == [10, 20]
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)
    rebuilt(fs, folder, [(1, START, 10), (1, middle, 12), (2, middle, 20)])
    assert online(fs, [1, 2]) == [12, 20]


def test_erased_entities_stay_away_whatever_runs(folder: Path, spark: SparkSession) -> None:
    """From all versions of the view: later runs, backfills, rebuilds and late copies bring nothing back, until it is undone."""
    pinned = "    model = FeatureService('model', [spend])\n"
    open_project(folder, SPEND + pinned, spark).apply()
    changed = SPEND.replace("payments)", "payments, transformation='SELECT user_id, at, -amount AS amount FROM {source}')")
    fs = open_project(folder, changed + pinned, spark)
    fs.apply()
    put(folder, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)

    def served() -> list[Any]:
        return [*online(fs, [1, 2], "spend@1:amount"), *online(fs, [1, 2], "spend@2:amount")]

    absent = ["NOT_FOUND", 20, "NOT_FOUND", -20]
    assert fs.erase("spend", {"user_id": [1]}) == {"view": "spend", "entities": 1, "online_keys": 2}
    assert served() == absent
    fs.materialize(START, END, everything=True)
    fs.materialize(START, END, restate=True)
    put(folder, [(1, START, 11), (1, START + HOUR, 12), (2, START, 20)])
    fs.build(start=START, end=END)
    fs.materialize_incremental(END)
    view = fs.registry.state().require_view("spend")
    late = spark.createDataFrame([(1, END, None, 7, 1)], "user_id bigint, event_timestamp timestamp, "
        "created_timestamp timestamp, amount bigint, _build int")  # fmt: skip
    assert publish_rows(view, late, OnlineTarget.of(fs.online_url(), view))[0].fenced == 1
    assert served() == absent

    fs.erase("spend", [{"user_id": 1}], undo=True)
    assert served() == absent
    fs.materialize(START, END, everything=True)
    assert served() == [12, 20, -12, -20]
    with pytest.raises(InvalidError, match="SFS-606"):
        fs.erase("spend", [{"user_id": None}])
    with pytest.raises(InvalidError, match="SFS-607"):
        fs.erase("spend", [{"user": 1}])


@pytest.mark.parametrize("what", ["files", "log"])
def test_an_old_version_that_was_cleaned_up_is_done_without(
    fs: FeatureStore, folder: Path, spark: SparkSession, what: str
) -> None:
    """What was published cannot be looked at any more: all rows are offered, and the run says what it could not find out."""
    put(folder, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)
    put(folder, [(1, START, 11), (3, START, 30)])
    fs.build(start=START, end=END)
    view = fs.registry.state().require_view("spend")
    path = feature_table_path(fs.environment.offline_root, view)
    if what == "files":
        spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
        spark.sql(f"VACUUM delta.`{path}` RETAIN 0 HOURS")
        spark.conf.unset("spark.databricks.delta.retentionDurationCheck.enabled")
    else:
        log = Path(path, "_delta_log")
        spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.checkpointInterval' = '1')")
        spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('spark_fs.note' = 'x')")
        newest = max(log.glob("*.checkpoint.parquet")).name.partition(".")[0]
        for file in log.glob("*.json"):
            if file.stem < newest:
                file.unlink()
    (result,) = fs.materialize_incremental(END)
    assert "is gone" in result.note
    assert (result.applied, result.withdrawn) == (2, 0)
    assert online(fs, [1, 2, 3]) == [11, 20, 30]
    assert fs.materialize_incremental(END)[0].note == ""


class BusyRegistry(Registry):
    """A registry in which another run of the view is always a moment quicker, until it has been so ``times`` times."""

    times = 0

    def set_published(self, view: ViewSpec, before: Published | None, after: Published, generation: int) -> bool:
        if self.times:
            self.times -= 1
            longer = Interval(START, END + (self.times + 1) * HOUR)
            less = replace(after, table_version=after.table_version - 1, intervals=(longer,))
            assert super().set_published(view, before, less, generation)
        return super().set_published(view, before, after, generation)


def test_a_run_that_others_overtake_looks_again_and_ends(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """What is noted as published is never more than what one run has seen; after three times it gives up, with all written."""
    put(folder, [(1, START, 10)])
    fs.build(end=END)
    registry = BusyRegistry(fs.environment.registry_url, fs.project)
    view = fs.registry.state().require_view("spend")
    table = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    target, interval = OnlineTarget.of(fs.online_url(), view), Interval(START, END)
    registry.times = 2
    result = materialize_view(registry, table, target, interval)
    noted = registry.published(view)
    assert noted is not None
    assert (noted.table_version, noted.intervals) == (result.table_version, (Interval(START, END + HOUR),))
    put(folder, [(1, START, 11)])
    fs.build(start=START, end=END)
    registry.times = 3
    with pytest.raises(ConflictError, match="SFS-615"):
        materialize_view(registry, table, target, interval)
    assert online(fs, [1]) == [11]


class CutRegistry(Registry):
    """A registry whose run is cut off after all is written, before it is noted; once."""

    cut = True

    def set_published(self, view: ViewSpec, before: Published | None, after: Published, generation: int) -> bool:
        if self.cut:
            self.cut = False
            raise InterruptedError("the process has ended here")
        return super().set_published(view, before, after, generation)


@pytest.mark.parametrize("published_before", [False, True])
@pytest.mark.parametrize("restate", [False, True])
def test_a_row_that_was_written_but_never_noted_goes_when_a_build_removes_it(
    fs: FeatureStore, folder: Path, spark: SparkSession, published_before: bool, restate: bool
) -> None:
    """The next run knows what the one before had set out to write, whatever has become of the table, and finishes it."""
    put(folder, [(1, START, 10)])
    fs.build(end=END)
    if published_before:
        fs.materialize_incremental(START + HOUR)
    put(folder, [(1, START, 10), (1, START + DAY, 11), (2, START + DAY, 21), (3, START + DAY, 31)])
    fs.build(start=START, end=END)
    registry = CutRegistry(fs.environment.registry_url, fs.project)
    view = fs.registry.state().require_view("spend")
    table = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    target = OnlineTarget.of(fs.online_url(), view)
    with pytest.raises(InterruptedError):
        materialize_view(registry, table, target, Interval(START, END), restate=restate)
    assert online(fs, [1, 2, 3]) == [11, 21, 31]
    (left,) = registry.ledger.unfinished(view)
    assert left.state == "running"
    assert sum(part.counts["applied"] for part in left.parts) == 3

    put(folder, [(1, START, 10), (3, START + DAY, 31)])
    fs.build(start=START, end=END)
    (result,) = fs.materialize(START, END)
    assert (result.withdrawn, online(fs, [1, 2, 3])) == (2, [10, "NOT_FOUND", 31])
    assert registry.ledger.unfinished(view) == []
    assert counts(fs.materialize(START, END)) == (0, 0, 0, 0, 0)
    assert fs.audit()[0].ok


def test_a_restated_row_that_is_gone_uncovers_the_newest(fs: FeatureStore, folder: Path) -> None:
    """Deleted at the source, it is served no more; a restated row that is still there stays, whatever else its key has lost."""
    middle = START + DAY
    rows = [(1, START, 10), (1, middle, 11), (2, START, 20), (2, START + HOUR, 21), (2, middle, 22)]
    put(folder, rows)
    fs.materialize_incremental(END)
    fs.materialize(START, START + HOUR, restate=True)
    assert online(fs, [1, 2]) == [10, 20]
    assert rebuilt(fs, folder, [(1, middle, 11), (2, START, 20), (2, middle, 22)]).withdrawn == 1
    assert online(fs, [1, 2]) == [11, 20]
    assert fs.audit()[0].ok


def test_a_run_that_was_stopped_goes_on_with_the_buckets_that_are_left(
    tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was confirmed before the server was full is not sent again; the ledger has both runs, bucket by bucket."""
    for bound in ("_LEAST_BYTES", "_MOST_BYTES"):  # a task for each bucket, small as they are
        monkeypatch.setattr(f"spark_fs.dispatch.{bound}", 1)
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        fs = open_project(tmp_path, SPEND, spark, settings=f"online:\n  url: {url}\noffline:\n  buckets: 16\n")
        fs.apply()
        put(tmp_path, [(user, START, user) for user in range(20_000)])
        fs.build(end=END)

        def look(demand: Demand, count_new_keys: Callable[[], int]) -> Demand:
            """Finds room enough, which others have taken a moment later."""
            client.config_set("maxmemory", client.info()["used_memory"] + 1_000_000)
            return check_capacity(demand, count_new_keys)

        with monkeypatch.context() as room:
            room.setattr("spark_fs.room.check_capacity", look)
            with pytest.raises(SparkFSError, match="SFS-603") as caught:
                fs.materialize_incremental(END)
        view = fs.registry.state().require_view("spend")
        (left,) = fs.registry.ledger.unfinished(view)
        confirmed = sum(part.counts["applied"] for part in left.parts)
        assert 0 < len(left.parts) < 16
        assert 0 < confirmed <= client.dbsize()
        assert caught.value.unfinished == [
            {
                "view": "spend@1",
                "state": "failed",
                "buckets_done": len(left.parts),
                "buckets_left": 16 - len(left.parts),
                "error": "SFS-603",
            }
        ]
        client.config_set("maxmemory", 0)
        (result,) = fs.materialize_incremental(END)
        assert (result.resumed, result.rows_read) == (len(left.parts), 20_000 - confirmed)
        assert online(fs, [0, 19_999]) == [0, 19_999]
        assert fs.audit()[0].ok
        runs = [run["run_id"] for run in fs.registry.runs() if run["kind"] == "materialize"]
        run, publications = fs.run(runs[1])
        assert (run["state"], [publication["state"] for publication in publications]) == ("failed", ["done"])
        assert sum(bucket["applied"] + bucket["equal"] for bucket in publications[0]["buckets"]) == 20_000
        assert fs.run(runs[0])[1] == []


def test_data_lost_while_a_run_writes_are_noticed_by_it(
    tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that comes back empty in the middle has lost the mark that the run left before it wrote."""
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        fs = against(tmp_path, spark, url)
        put(tmp_path, [(user, START, user) for user in range(100)])
        fs.build(end=END)

        def publish(*arguments: Any) -> Any:
            """The server loses all between the run's first mark and its last."""
            client.flushall()
            return publish_files(*arguments)

        with monkeypatch.context() as flushed:
            flushed.setattr("spark_fs.materialize.publish_files", publish)
            with pytest.raises(SparkFSError, match=r"SFS-616.*meanwhile"):
                fs.materialize_incremental(END)
        assert fs.registry.published(fs.registry.state().require_view("spend")) is None
        assert counts(fs.materialize_incremental(END)) == (100, 0, 100, 0, 0)
        assert fs.audit()[0].ok


# ---- all anew


class WatchedRegistry(Registry):
    """A registry that looks at what readers see just before a run is noted, and may let the run be cut off just after."""

    seen: Any = None
    look: Callable[[], Any]
    cut = False

    def set_published(self, view: ViewSpec, before: Published | None, after: Published, generation: int) -> bool:
        self.seen = self.look()
        noted = super().set_published(view, before, after, generation)
        if self.cut:
            raise InterruptedError("the process has ended here")
        return noted


def planted(fs: FeatureStore, user: int, amount: int) -> None:
    """A row that stands for nothing at the source, as a foreign program might write it."""
    view = fs.registry.state().require_view("spend")
    row = batch([b"%d" % user], END - HOUR, features=view.features, amount=[amount])
    write_batches(iter([row]), fs._target(view))


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_full_refresh_is_seen_all_at_once_and_can_be_rolled_back(fs: FeatureStore, folder: Path, is_cut: bool) -> None:
    """Until it is noted readers see the old rows only, then the new ones only; interrupted there, the next run ends it."""
    put(folder, [(user, START, user) for user in range(200)])
    fs.materialize_incremental(END)
    planted(fs, 999, 1)
    with pytest.raises(InvalidError, match="SFS-618"):
        fs.roll_back("spend")
    put(folder, [(user, START, user + 1_000) for user in range(100)])
    fs.build(start=START, end=END)
    old, new = [0, 99, 100, 1], [1_000, 1_099, "NOT_FOUND", "NOT_FOUND"]
    registry = WatchedRegistry(fs.environment.registry_url, fs.project)
    registry.look, registry.cut = (lambda: online(fs, [0, 99, 100, 999])), is_cut
    view = fs.registry.state().require_view("spend")

    def refresh() -> MaterializeResult:
        table, target = fs._offline.table(view), fs._target(view)
        return materialize_view(registry, table, target, Interval(START, END), full=True)

    if is_cut:
        with pytest.raises(InterruptedError):
            refresh()
        assert online(fs, [0, 99, 100, 999]) == old
        assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)
    else:
        result = refresh()
        assert (result.rows_read, result.applied) == (100, 100)
    assert registry.seen == old
    assert online(fs, [0, 99, 100, 999]) == new
    assert fs.audit()[0].ok
    assert fs.registry.ledger.unfinished(view) == []
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)

    assert fs.roll_back("spend") == {"view": "spend@1", "table_version": 1, "epoch": 0}
    assert online(fs, [0, 99, 100, 999]) == old
    fs.roll_back("spend")
    assert online(fs, [0, 99, 100, 999]) == new
    fs.roll_back("spend")
    result = fs.materialize_incremental(END)[0]
    assert (result.applied, result.withdrawn) == (100, 100)
    assert online(fs, [0, 99, 100, 999]) == [1_000, 1_099, "NOT_FOUND", 1]
    assert not fs.audit()[0].ok


def test_refreshes_leave_nothing_behind_but_what_can_be_rolled_back_to(fs: FeatureStore, folder: Path) -> None:
    """Rows of two epochs at most; a new refresh after a stopped one starts anew; erased entities are in neither."""
    put(folder, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)
    view = fs.registry.state().require_view("spend")
    cut = CutRegistry(fs.environment.registry_url, fs.project)
    with pytest.raises(InterruptedError):
        materialize_view(cut, fs._offline.table(view), fs._target(view), Interval(START, END), full=True)
    assert fs.registry.epochs(view) == [0, 1]
    for refresh in range(3):
        put(folder, [(1, START, 100 + refresh), (2, START, 20)])
        fs.build(start=START, end=END)
        fs.materialize(START, END, full=True)
        assert online(fs, [1, 2]) == [100 + refresh, 20]
    epochs = fs.registry.epochs(view)
    assert len(epochs) == 2
    with redis.Redis.from_url(fs.online_url()) as client:
        assert len(list(client.scan_iter(key_prefix(view)[:-1] + b"*{*}:[12]"))) == 4
    fs.erase("spend", {"user_id": [2]})
    assert online(fs, [1, 2]) == [102, "NOT_FOUND"]
    fs.roll_back("spend")
    assert online(fs, [1, 2]) == [101, "NOT_FOUND"]
    with pytest.raises(InvalidError, match="SFS-619"):
        fs.materialize(START, END, full=True, restate=True)


# ---- what the server has lost, and what it should not have


def test_an_audit_finds_every_fault_and_a_repair_mends_them(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """Lost, changed, older and foreign rows: each is counted and noted in Delta; afterwards all is as it should be."""
    put(folder, [(user, START + user * HOUR, user) for user in range(8)])
    assert fs.audit() == []
    fs.materialize_incremental(END)
    (clean,) = fs.audit()
    assert (clean.ok, clean.keys, clean.extra) == (True, 8, 0)
    assert clean.features == {"amount": dict.fromkeys(STATUSES_OF_FEATURES, 0) | {"equal": 8}}

    view = fs.registry.state().require_view("spend")
    prefix = key_prefix(view)
    with redis.Redis.from_url(fs.online_url()) as client:
        client.delete(redis_key(prefix, b"0"))
        client.setrange(redis_key(prefix, b"1"), 29, b"\x63")
        client.set(redis_key(prefix, b"99"), client.get(redis_key(prefix, b"2")))  # type: ignore[arg-type]
        older = client.get(redis_key(prefix, b"3"))
        client.set(redis_key(prefix, b"4"), older)  # type: ignore[arg-type]
        client.set(redis_key(prefix, b"2"), client.get(redis_key(prefix, b"7")))  # type: ignore[arg-type]
    (found,) = fs.audit()
    assert not found.ok
    assert (found.keys, found.extra) == (8, 1)
    counted = {"equal": 4, "missing": 1, "wrong": 1, "stale": 1, "ahead": 1}
    assert found.features == {"amount": dict.fromkeys(STATUSES_OF_FEATURES, 0) | counted}
    noted = spark.read.format("delta").load(found.findings).where(f"audit_id = '{found.audit_id}' AND key IS NOT NULL")
    assert {(bytes(row["key"]), row["feature"], row["status"]) for row in noted.collect()} == {
        (b"0", None, "missing"),
        (b"1", "amount", "wrong"),
        (b"4", None, "stale"),
        (b"99", None, "extra"),
    }
    assert fs.audit(sample=8)[0].extra == 0
    assert fs.audit(sample=3)[0].keys == 3

    (result,) = fs.repair()
    assert (result.rows_read, result.applied, result.equal, result.withdrawn) == (8, 4, 4, 1)
    assert fs.audit()[0].ok
    assert online(fs, [*range(8), 99]) == [*range(8), "NOT_FOUND"]
    assert fs.materialize_incremental(END)[0].rows_read == 0


def test_a_repair_with_a_ttl_and_changes_under_way_ends(folder: Path, spark: SparkSession) -> None:
    """Rows past their ttl leave tombstones; what builds have changed meanwhile is published by the same repair."""
    fs = open_project(folder, SPEND.replace("payments)", "payments, ttl=timedelta(days=2))"), spark)
    fs.apply()
    put(folder, [(1, END - DAY, 10), (2, END - 3 * DAY, 20)])
    fs.materialize_incremental(END)
    put(folder, [(1, END - DAY, 11), (2, END - 3 * DAY, 21), (3, END - DAY, 30)])
    fs.build(start=START, end=END)
    (result,) = fs.repair()
    assert (result.applied, result.expired) == (2, 1)
    assert online(fs, [1, 2, 3]) == [11, "NOT_FOUND", 30]
    assert fs.audit()[0].ok
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)


def test_an_erased_row_that_came_back_is_found_and_removed(fs: FeatureStore, folder: Path) -> None:
    """As after a restart from an older copy: it is there again, although no run would write it."""
    put(folder, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)
    name = redis_key(key_prefix(fs.registry.state().require_view("spend")), b"1")
    with redis.Redis.from_url(fs.online_url()) as client:
        before = client.get(name)
        fs.erase("spend", {"user_id": [1]})
        assert fs.audit()[0].ok
        client.set(name, before)  # type: ignore[arg-type]
    (found,) = fs.audit()
    assert (found.ok, found.extra, found.keys) == (False, 1, 1)
    fs.repair()
    assert online(fs, [1, 2]) == ["NOT_FOUND", 20]
    assert fs.audit()[0].ok


def test_a_withdrawal_does_not_undo_what_others_have_noted(fs: FeatureStore, folder: Path, spark: SparkSession) -> None:
    """A run that looked at the table before another one published newer rows drops its withdrawal and looks again."""
    put(folder, [(1, START, 10), (1, START + HOUR, 11)])
    fs.materialize_incremental(END)
    put(folder, [(1, START, 10)])
    fs.build(start=START, end=END)
    view = fs.registry.state().require_view("spend")

    class Overtaken(Registry):
        """When it is about to withdraw, another run has just published a newer row."""

        done = False

        def raise_generation(self, view: ViewSpec, *, restates: bool = False) -> int:
            if not self.done:
                self.done = True
                put(folder, [(1, START, 10), (1, START + 2 * HOUR, 12)])
                fs.build(start=START, end=END)
                fs.materialize_incremental(END)
            return super().raise_generation(view, restates=restates)

    registry = Overtaken(fs.environment.registry_url, fs.project)
    table = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    materialize_view(registry, table, OnlineTarget.of(fs.online_url(), view), Interval(START, END))
    assert online(fs, [1]) == [12]
    assert fs.audit()[0].ok


def test_a_restated_value_is_no_fault_until_it_is_repaired(fs: FeatureStore, folder: Path) -> None:
    """It is counted by itself; a repair makes it the newest again."""
    put(folder, [(1, START, 10), (1, START + DAY, 11)])
    fs.materialize_incremental(END)
    fs.materialize(START, START + DAY, restate=True)
    (found,) = fs.audit()
    assert (found.ok, found.features["amount"]["restated"]) == (True, 1)
    assert online(fs, [1]) == [10]
    fs.repair()
    assert online(fs, [1]) == [11]
    assert fs.audit()[0].features["amount"]["equal"] == 1


def test_a_server_that_lost_its_data_is_noticed(tmp_path: Path, spark: SparkSession) -> None:
    """Killed and restarted without them: the next run says so and moves nothing, and a repair brings all back."""
    port = free_port()
    fs = against(tmp_path, spark, f"redis://127.0.0.1:{port}/0")
    put(tmp_path, [(user, START, user) for user in range(100)])
    with redis_process(tmp_path, port=port):
        fs.materialize_incremental(END)
    before = fs.registry.published(fs.registry.state().require_view("spend"))
    with redis_process(tmp_path, port=port):
        put(tmp_path, [(user, START, user) for user in range(101)])
        fs.build(start=START, end=END)
        with pytest.raises(SparkFSError, match=r"SFS-616.*spark-fs repair spend@1"):
            fs.materialize_incremental(END)
        assert fs.registry.published(fs.registry.state().require_view("spend")) == before
        (found,) = fs.audit()
        assert found.features["amount"]["missing"] == found.keys == 100
        fs.repair()
        assert online(fs, [0, 99, 100]) == [0, 99, 100]
        assert fs.audit()[0].ok
        assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)


# ---- any order of all that

#: Generation, event hour, build and value of a row online; no value: a tombstone.
Row = tuple[int, int, int, int | None]


@dataclass
class Model:
    """Source, feature table and online store as dicts: (user, event hour) → value, (build, value), and user → row."""

    source: dict[tuple[int, int], int]
    table: dict[tuple[int, int], tuple[int, int]]
    online: dict[int, Row]
    erased: set[int]
    covered: int = 0
    build: int = 0
    generation: int = 1
    has_restated: bool = False
    known: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    hours: set[int] = field(default_factory=set)
    sent: list[tuple[int, dict[tuple[int, int], tuple[int, int]]]] = field(default_factory=list)

    def rebuild(self, start: int, end: int) -> None:
        self.build += 1
        kept = {place: row for place, row in self.table.items() if not start <= place[1] < end}
        self.table = kept | {p: (self.build, value) for p, value in self.source.items() if start <= p[1] < end}

    def cover(self, end: int) -> None:
        if end > self.covered:
            self.rebuild(self.covered, end)
            self.covered = end

    def newest(self, user: int, hours: set[int]) -> Row | None:
        """The user's newest row in the table, as a run of the model's generation offers it."""
        rows = [(self.generation, event, *row) for (of, event), row in self.table.items() if of == user and event in hours]
        return max(rows, default=None, key=lambda row: row[1])

    def offer(self, user: int, row: Row | None, *, restate: bool = False) -> None:
        """What the guarded write does."""
        there = self.online.get(user)
        if row is None or (user in self.erased and row[3] is not None):
            return
        if there is None or (restate and row[0] > there[0]) or (row[1:3] > there[1:3] and row[0] >= there[0]):
            self.online[user] = row

    def publish(self, users: Sequence[int], start: int, end: int, *, restate: bool = False, everything: bool = False) -> None:
        self.cover(end)
        wanted, began, hours = set(range(start, end)), self.generation, set(self.hours)
        changed = {p: row for p, row in self.table.items() if p[1] in hours and self.known.get(p, (0, None))[1] != row[1]}
        for user in users:
            self.offer(user, self.newest(user, {event for of, event in changed if of == user}))
        lost: dict[int, set[int]] = {}
        for of, event in self.known:
            if event in hours and (of, event) not in self.table:
                lost.setdefault(of, set()).add(event)
        self.hours |= wanted
        if lost:
            self.generation += 1
        for user, events in lost.items():
            row = self.newest(user, self.hours) or (self.generation, -1, -1, None)
            is_served = self.has_restated and self.online.get(user, row)[1] in events
            if (row[1] < max(events) or is_served) and user not in self.erased:
                self.offer(user, row, restate=True)
        offering = began
        if restate:
            self.has_restated = True
            self.generation += 1
            offering = self.generation
        for user in users:
            row = self.newest(user, wanted if restate or everything else wanted - hours)
            self.offer(user, row and (offering, *row[1:]), restate=restate)
        if restate:
            self.generation += 1
        self.known = dict(self.table)
        self.sent.append((began, {place: row for place, row in self.known.items() if place[1] in self.hours}))


@pytest.mark.parametrize(("seed", "restatements"), [(20130701, False), (20130702, True)])
def test_any_sequence_ends_as_the_model_says(fs: FeatureStore, folder: Path, seed: int, restatements: bool) -> None:
    """Rows of all kinds, deletions, builds, runs, erasures, late copies and restatements in random order.

    After each step that publishes every key is as a dict has it; without restatements that is the newest row of the table.
    """
    choose, users = random.Random(seed), range(4)
    model, now = Model({(0, 0): 0}, {}, {}, set()), 1
    put(folder, [(0, START, 0)])
    view = fs.registry.state().require_view("spend")
    steps = ["append", "append", "late", "correct", "delete", "rebuild", "materialize", "incremental", "late copy"]
    steps = [*steps * 3, "everything", "erase", "undo", *["restate"] * (3 * restatements)]
    choose.shuffle(steps)
    for value, step in enumerate([*steps, "build", "incremental"], 1):
        start = choose.randrange(now)
        end = choose.randrange(start + 1, now + 1)
        moments = START + start * HOUR, START + end * HOUR
        if step == "append":
            model.source[choose.choice(users), now] = value
            now += 1
        elif step == "late":
            model.source[choose.choice(users), start] = value
        elif step == "correct":
            model.source[choose.choice(sorted(model.source))] = value
        elif step == "delete" and len(model.source) > 1:
            del model.source[choose.choice(sorted(model.source))]
        if step in ("append", "late", "correct", "delete"):
            put(folder, [(user, START + hour * HOUR, amount) for (user, hour), amount in model.source.items()])
        elif step == "build":
            fs.build(start=START, end=START + now * HOUR)
            model.rebuild(0, now)
            model.covered = now
        elif step == "rebuild" and end <= model.covered:
            fs.build(start=moments[0], end=moments[1])
            model.rebuild(start, end)
        elif step == "materialize":
            fs.materialize(*moments)
            model.publish(users, start, end)
        elif step == "everything":
            fs.materialize(*moments, everything=True)
            model.publish(users, start, end, everything=True)
        elif step == "restate":
            fs.materialize(*moments, restate=True)
            model.publish(users, start, end, restate=True)
        elif step == "incremental":
            fs.materialize_incremental(START + now * HOUR)
            model.publish(users, 0, now)
        elif step == "erase":
            fs.erase("spend", {"user_id": [3]})
            model.erased, model.online[3] = {3}, (2**32 - 1, -1, -1, None)
        elif step == "undo" and model.erased:
            fs.erase("spend", {"user_id": [3]}, undo=True)
            model.erased = set()
            del model.online[3]
        elif step == "late copy" and model.sent:
            generation, table = choose.choice(model.sent)
            rows = [(user, START + hour * HOUR, build, amount) for (user, hour), (build, amount) in table.items()]
            copies = batch(
                [b"%d" % user for user, *_ in rows],
                [event for _, event, *_ in rows],
                builds=[build for _, _, build, _ in rows],
                features=view.features,
                amount=[amount for *_, amount in rows],
            )
            write_batches(iter([copies]), OnlineTarget.of(fs.online_url(), view, generation=generation))
            erased, model.erased = model.erased, set()
            for (user, hour), (build, amount) in table.items():
                model.offer(user, (generation, hour, build, amount))
            model.erased = erased
        if step not in ("append", "late", "correct", "delete", "build", "rebuild"):
            served = [model.online.get(user, (0, 0, 0, None))[3] for user in users]
            expected = ["NOT_FOUND" if amount is None else amount for amount in served]
            assert online(fs, users) == expected, f"after {step} [{start}, {end}) of hour {now}, step {value}, seed {seed}"
        if step == "incremental" and not restatements:
            newest = [model.newest(user, set(range(now))) for user in users]
            assert expected == [row[3] if row and user not in model.erased else "NOT_FOUND" for user, row in enumerate(newest)]


# ---- what goes wrong


def refused(fs: FeatureStore, spark: SparkSession) -> SparkFSError:
    """The error of a run that must start no Spark job and publish nothing."""
    group = f"refused {fs.environment.root}"
    spark.sparkContext.setJobGroup(group, group)
    try:
        with pytest.raises(SparkFSError) as caught:
            fs.materialize_incremental(END)
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", "")
    assert list(spark.sparkContext.statusTracker().getJobIdsForGroup(group)) == []
    assert fs.registry.published(fs.registry.state().require_view("spend")) is None
    assert [run for run in fs.registry.runs() if run["state"] != "failed"] == []
    return caught.value


def against(folder: Path, spark: SparkSession, url: str) -> FeatureStore:
    """An applied project that publishes to ``url``."""
    fs = open_project(folder, SPEND, spark, settings=f"online:\n  url: {url}\n")
    fs.apply()
    put(folder, [(1, START, 10)])
    return fs


def test_a_dead_server_is_refused_before_spark_runs(tmp_path: Path, spark: SparkSession) -> None:
    """Nobody waits for a build to learn that the online store is down."""
    error = refused(against(tmp_path, spark, f"redis://127.0.0.1:{free_port()}/0"), spark)
    assert isinstance(error, UnavailableError)
    assert error.code == "SFS-601"


def test_a_wrong_password_is_refused_and_not_told(tmp_path: Path, spark: SparkSession) -> None:
    """The login fails before Spark runs, and neither message nor registry holds the password."""
    with redis_process(tmp_path, password="sesame") as url:
        error = refused(against(tmp_path, spark, url.replace("sesame", "wrong-canary")), spark)
    assert error.code == "SFS-602"
    assert "canary" not in str(error)
    assert b"canary" not in (tmp_path / ".spark_fs" / "registry.db").read_bytes()


def test_an_evicting_server_is_refused(tmp_path: Path, spark: SparkSession) -> None:
    """A server that drops features when full is no feature store."""
    with redis_process(tmp_path, "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru") as url:
        error = refused(against(tmp_path, spark, url), spark)
    assert error.code == "SFS-604"
    assert "allkeys-lru" in str(error)


def test_a_full_server_fails_the_run_and_the_next_one_completes_it(
    tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in an executor reaches the driver as SFS-603; with more memory the same run ends complete."""
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        fs = against(tmp_path, spark, url)
        put(tmp_path, [(user, START, user) for user in range(20_000)])

        def look(demand: Demand, count_new_keys: Callable[[], int]) -> Demand:
            """Finds room enough, which others have taken a moment later."""
            client.config_set("maxmemory", client.info()["used_memory"] + 300_000)
            return check_capacity(demand, count_new_keys)

        monkeypatch.setattr("spark_fs.room.check_capacity", look)
        with pytest.raises(SparkFSError) as caught:
            fs.materialize_incremental(END)
        assert caught.value.code == "SFS-603"
        assert "spend@1" in str(caught.value)
        assert fs.registry.published(fs.registry.state().require_view("spend")) is None
        assert {run["kind"]: run["state"] for run in fs.registry.runs()} == {"build": "done", "materialize": "failed"}
        written = len(list(client.scan_iter("shop:spend@1:{*", count=5_000)))
        assert 0 < written < 20_000
        client.config_set("maxmemory", 0)
        monkeypatch.undo()
        assert counts(fs.materialize_incremental(END)) == (20_000, 20_000 - written, written, 0, 0)
        assert online(fs, [0, 19_999]) == [0, 19_999]


VECTORS = """
    user = Entity("user", [Field("user_id", Int64)])
    views = [
        FeatureView(name, user, [Field("v", Embedding(2))],
                    FileSource(f"{name}_rows", path=f"data/{name}", timestamp_field="at"))
        for name in ("first", "middle", "last")
    ]
"""
VECTOR_ROWS = pa.schema([("user_id", pa.int64()), ("at", INSTANT), ("v", pa.list_(pa.float32()))])


def test_a_failing_view_does_not_stop_the_others(folder: Path, spark: SparkSession) -> None:
    """A poisoned row, then a source that is gone: two of three views are published, the third is named and left as it was."""
    fs = open_project(folder, VECTORS, spark)
    fs.apply()
    names = ("first", "middle", "last")

    def fill(number: float, at: datetime, poisoned: str = "") -> None:
        for name in names:
            put(folder, [(1, at, [number] * (3 if name == poisoned else 2))], VECTOR_ROWS, name)

    def marks() -> dict[str, Any]:
        return {name: fs.registry.published(fs.registry.state().require_view(name)) for name in names}

    def failing(name: str, code: str, end: datetime) -> None:
        before = marks()
        with pytest.raises(PartlyDoneError) as caught:
            fs.materialize_incremental(end)
        assert caught.value.exit_code == ExitCode.PARTLY_DONE
        assert [(problem.code, problem.what.partition(":")[0]) for problem in caught.value.problems] == [(code, f"{name}@1")]
        assert {result.view for result in caught.value.results} == {f"{other}@1" for other in names if other != name}
        assert {other for other, mark in marks().items() if mark == before[other]} == {name}
        runs = {run["subject"]: run["state"] for run in reversed(fs.registry.runs()) if run["kind"] == "materialize"}
        assert runs == {f"{other}@1": "failed" if other == name else "done" for other in names}

    def read() -> list[Any]:
        return [online(fs, [1], f"{name}:v")[0] for name in names]

    fill(1.0, START)
    fs.materialize_incremental(START + HOUR)
    fill(2.0, START + HOUR, poisoned="middle")
    failing("middle", "SFS-407", START + 2 * HOUR)
    assert read() == [[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]

    fill(3.0, START + 2 * HOUR)
    (folder / "data" / "last").rename(folder / "data" / "gone")
    failing("last", "SFS-401", START + 3 * HOUR)
    assert read() == [[3.0, 3.0], [3.0, 3.0], [2.0, 2.0]]

    (folder / "data" / "gone").rename(folder / "data" / "last")
    fs.materialize_incremental(START + 3 * HOUR)
    assert read() == [[3.0, 3.0]] * 3


def test_all_views_failing_is_a_failure(fs: FeatureStore, folder: Path) -> None:
    """With no view done the run is not partly done: the error is that of the view, named once."""
    with pytest.raises(InvalidError) as caught:
        fs.materialize_incremental(END)
    assert (caught.value.code, str(caught.value).count("spend@1")) == ("SFS-401", 1)


# ---- memory


def peak_bytes(spark: SparkSession) -> int:
    """The greatest memory that any Python worker of this session ever held (Linux counts it)."""
    daemons = {str(spark.sparkContext._gateway.proc.pid)}  # type: ignore[union-attr]  # what Spark starts, its workers descend from
    peaks, parents = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue  # it has just ended
        parents[status.parent.name] = lines["PPid"].strip()
        if "VmHWM" in lines and lines["Name"].startswith("python"):
            peaks[status.parent.name] = int(lines["VmHWM"].split()[0]) * 1024

    def ours(pid: str) -> bool:
        return pid in daemons or (pid in parents and ours(parents[pid]))

    return max(peak for pid, peak in peaks.items() if ours(pid))


def test_a_worker_holds_a_batch_not_its_partition(folder: Path, spark: SparkSession) -> None:
    """Ten times the rows in one partition take the same memory in the Python worker that writes them."""
    target = OnlineTarget.of(server.start(folder / ".spark_fs").url, view_of())

    def peak_of(rows: int) -> int:
        frame = spark.range(0, rows, 1, 1).select(
            F.encode((F.col("id") % 1_000).cast("string"), "UTF-8").alias("_key"),
            F.timestamp_micros(F.col("id")).alias("event_timestamp"),
            F.lit(None).cast("timestamp").alias("created_timestamp"),
            F.lit(1).alias("_build"),
            F.col("id").alias("n"),
            F.repeat(F.lit("x"), 100).alias("s"),
        )
        measures = ", ".join(f"{name} bigint" for name in executor.MEASURES)
        written = frame.mapInArrow(partial(executor.publish_rows, target=target), measures).first()
        assert written is not None
        assert written["rows_read"] == rows
        return peak_bytes(spark)

    small, large = peak_of(200_000), peak_of(2_000_000)
    assert large < 1.5 * small
