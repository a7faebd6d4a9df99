"""From feature tables to the online store: what is read online is what training would have seen at that moment."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from spark_fs import FeatureStore
from spark_fs.build import build_interval
from spark_fs.errors import ExitCode, InvalidError, PartlyDoneError, SparkFSError, UnavailableError
from spark_fs.files import feature_table_path
from spark_fs.intervals import Interval
from spark_fs.materialize import MaterializeResult
from spark_fs.offline.tables import FeatureTable
from spark_fs.online import executor, server
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec
from tests.online.servers import free_port, redis_process, view_of
from tests.project import open_project, write

UTC = timezone.utc
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
        stored = {key: client.get(key) for key in client.scan_iter()}
    assert first.bytes == sum(len(key) + len(value) for key, value in stored.items())

    (again,) = fs.materialize_incremental(END)
    assert (*counts([again]), again.bytes) == (0, 0, 0, 0, 0, 0)
    (whole,) = fs.materialize(START, END)
    assert (*counts([whole]), whole.bytes) == (20, 0, 5, 0, 0, first.bytes)
    assert online(fs, range(5)) == [3, 103, 203, 303, 403]
    assert [run["state"] for run in fs.registry.runs() if run["kind"] == "materialize"] == ["done"] * 3


def test_late_rows_and_corrections_get_through(fs: FeatureStore, folder: Path) -> None:
    """Incremental goes by what builds wrote, not by event time: an old row and a value corrected in place are published."""
    old, new = START + HOUR, START + DAY
    put(folder, [(1, old, 10), (1, new, 11), (2, new, 20)])
    fs.materialize_incremental(END)
    put(folder, [(1, old, 10), (1, new, 12), (2, new, 20), (3, old, 30)])
    assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)
    fs.build(start=START, end=START + 2 * DAY)
    result = counts(fs.materialize_incremental(END))
    # All rows of the rebuilt interval belong to a later build, so each counts as newer.
    assert result == (4, 3, 0, 0, 0)
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
    assert counts(fs.materialize_incremental(END)) == (4, 1, 2, 0, 0)
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
    """A backfill and an incremental run side by side leave the newest row of each key."""
    users = range(2_000)
    put(folder, [(user, START + (user * 7 + n) % 50 * HOUR, user * 10 + n) for user in users for n in range(3)])
    fs.build(end=END)
    other = FeatureStore(folder, "test", spark=spark)
    with ThreadPoolExecutor(2) as pool:
        backfill = pool.submit(other.materialize, START, START + DAY)
        incremental = pool.submit(fs.materialize_incremental, END)
    for run in (backfill, incremental):
        assert run.result()[0].rows_read > 0
    newest = [max(((user * 7 + n) % 50, user * 10 + n) for n in range(3))[1] for user in users]
    assert online(fs, users) == newest


# ---- any order of all that


@dataclass
class Model:
    """Source, feature table and online store as dicts: (user, event hour) → value, and user → (event, build, value)."""

    source: dict[tuple[int, int], int]
    table: dict[tuple[int, int], tuple[int, int]]
    online: dict[int, tuple[int, int, int]]
    covered: int = 0
    build: int = 0

    def rebuild(self, start: int, end: int) -> None:
        self.build += 1
        kept = {place: row for place, row in self.table.items() if not start <= place[1] < end}
        self.table = kept | {p: (self.build, value) for p, value in self.source.items() if start <= p[1] < end}

    def cover(self, end: int) -> None:
        if end > self.covered:
            self.rebuild(self.covered, end)
            self.covered = end

    def publish(self, start: int, end: int) -> None:
        self.cover(end)
        for (user, event), (build, value) in self.table.items():
            if start <= event < end:
                self.online[user] = max(self.online.get(user, (-1, -1, -1)), (event, build, value))


@pytest.mark.parametrize("seed", [20130701])
def test_any_sequence_ends_as_the_model_says(fs: FeatureStore, folder: Path, seed: int) -> None:
    """Rows, late rows, corrections, builds and runs in random order: after each run every key is as a dict has it."""
    choose, users = random.Random(seed), range(4)
    model, now = Model({(0, 0): 0}, {}, {}), 1
    put(folder, [(0, START, 0)])
    steps = ["append", "late", "correct", "build", "rebuild", "materialize", "incremental"] * 4
    choose.shuffle(steps)
    for value, step in enumerate([*steps, "incremental"], 1):
        start = choose.randrange(now)
        end = choose.randrange(start + 1, now + 1)
        if step == "append":
            model.source[choose.choice(users), now] = value
            now += 1
        elif step == "late":
            model.source[choose.choice(users), start] = value
        elif step == "correct":
            model.source[choose.choice(sorted(model.source))] = value
        if step in ("append", "late", "correct"):
            put(folder, [(user, START + hour * HOUR, amount) for (user, hour), amount in model.source.items()])
        elif step == "build":
            fs.build(end=START + now * HOUR)
            model.cover(now)
        elif step == "rebuild" and end <= model.covered:
            fs.build(start=START + start * HOUR, end=START + end * HOUR)
            model.rebuild(start, end)
        elif step == "materialize":
            fs.materialize(START + start * HOUR, START + end * HOUR)
            model.publish(start, end)
        elif step == "incremental":
            fs.materialize_incremental(START + now * HOUR)
            model.publish(0, now)
        if step in ("materialize", "incremental"):
            expected = [model.online[user][2] if user in model.online else "NOT_FOUND" for user in users]
            assert online(fs, users) == expected, f"after {step} [{start}, {end}) of hour {now}, seed {seed}"
    newest = [max((event, row[1]) for (u, event), row in model.table.items() if u == user)[1] for user in users]
    assert online(fs, users) == newest


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
    assert fs.registry.watermark(fs.registry.state().require_view("spend")) is None
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


def test_a_full_server_fails_the_run_and_the_next_one_completes_it(tmp_path: Path, spark: SparkSession) -> None:
    """Out of memory in an executor reaches the driver as SFS-603; with more memory the same run ends complete."""
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        fs = against(tmp_path, spark, url)
        put(tmp_path, [(user, START, user) for user in range(20_000)])
        client.config_set("maxmemory", client.info()["used_memory"] + 300_000)
        with pytest.raises(SparkFSError) as caught:
            fs.materialize_incremental(END)
        assert caught.value.code == "SFS-603"
        assert "spend@1" in str(caught.value)
        assert fs.registry.watermark(fs.registry.state().require_view("spend")) is None
        assert {run["kind"]: run["state"] for run in fs.registry.runs()} == {"build": "done", "materialize": "failed"}
        written = client.dbsize()
        assert 0 < written < 20_000
        client.config_set("maxmemory", 0)
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
        return {name: fs.registry.watermark(fs.registry.state().require_view(name)) for name in names}

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
