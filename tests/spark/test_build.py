"""Building feature tables: intervals, what is set aside, the layout, drift, failures and races; real Spark and Delta."""

from __future__ import annotations

import json
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from spark_fs import FeatureStore
from spark_fs.errors import ConflictError, ExitCode, InvalidError, PartlyDoneError, SparkFSError
from spark_fs.files import feature_table_path
from spark_fs.intervals import BEGINNING, UTC, Interval
from spark_fs.offline.transaction import Transaction
from spark_fs.online.codec import key_bytes
from spark_fs.registry import Registry
from spark_fs.spec import ViewSpec
from tests.project import open_project, write_delta

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

START = datetime(2024, 1, 1, tzinfo=UTC)
INSTANT = pa.timestamp("us", tz="UTC")
PAYMENTS = {"user_id": pa.int64(), "ts": INSTANT, "loaded_at": INSTANT, "amount": pa.float64()}
SPEND = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts", created_timestamp_field="loaded_at")
    spend = FeatureView("spend", user, [Field("amount", Float64)], payments)
"""

Row = tuple[Any, ...]


def at(hours: float | None) -> datetime | None:
    return None if hours is None else START + timedelta(hours=hours)


def pay(folder: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write the source: rows of (user, hour, hour of loading, amount)."""
    write_delta(folder / "raw" / "payments", PAYMENTS, [(user, at(ts), at(loaded), x) for user, ts, loaded, x in rows])


def table_path(store: FeatureStore, view: str = "spend", version: int | None = None) -> str:
    return feature_table_path(store.environment.offline_root, store.registry.state().require_view(view, version))


def stored(store: FeatureStore, *columns: str, view: str = "spend", version: int | None = None) -> list[Row]:
    """These columns of all rows of a feature table, sorted, with instants as hours; read without Spark."""
    rows = DeltaTable(table_path(store, view, version)).to_pyarrow_table(columns=list(columns)).to_pylist()
    found = [tuple(_hours(row[name]) for name in columns) for row in rows]
    return sorted(found, key=lambda row: [(value is not None, value) for value in row])


def _hours(value: Any) -> Any:
    return (value - START) / timedelta(hours=1) if isinstance(value, datetime) else value


@pytest.fixture
def store(spark: SparkSession, tmp_path: Path) -> FeatureStore:
    """A project with one view over an empty source, applied."""
    pay(tmp_path, [])
    opened = open_project(tmp_path, SPEND, spark)
    opened.apply()
    return opened


def test_a_build_replaces_its_interval_and_touches_no_other(store: FeatureStore, tmp_path: Path):
    """`[start, end)`: the end is left out, a repeated build gives the same rows, rows of other intervals stay as written."""
    rows = [(1, hour, hour, float(hour)) for hour in (-1, 0, 1, 2, 3)]
    pay(tmp_path, rows)
    [first] = store.build(end=at(2))
    assert (first.interval, first.build, first.rows_written) == (Interval(BEGINNING, at(2)), 1, 3)
    assert stored(store, "event_timestamp", "amount", "_build") == [(-1, -1, 1), (0, 0, 1), (1, 1, 1)]
    assert store.missing(end=at(4)) == {"spend@1": [Interval(at(2), at(4))]}

    [second] = store.build(end=at(4))
    assert (second.interval, second.rows_written) == (Interval(at(2), at(4)), 2)
    assert store.missing(end=at(4)) == {"spend@1": []}
    assert store.build(end=at(4)) == []

    pay(tmp_path, [*rows[:2], (1, 1, 1, 10.0), (1, 2, 2, 20.0), rows[4], (1, 1.5, 1.5, 15.0)])
    expected = [(-1, -1, 1), (0, 0, 1), (1, 10, 3), (1.5, 15, 3), (2, 2, 2), (3, 3, 2)]
    store.build(start=at(1), end=at(2))
    assert stored(store, "event_timestamp", "amount", "_build") == expected
    store.build(start=at(1), end=at(2))
    assert [row[:2] for row in stored(store, "event_timestamp", "amount", "_build")] == [row[:2] for row in expected]


def test_rows_that_no_table_can_hold_are_set_aside_and_counted(spark: SparkSession, store: FeatureStore, tmp_path: Path):
    """Null keys, null times, times past the limit and lost ties are counted; equal times with other created times all stay."""
    future = (datetime.now(UTC) - START) / timedelta(hours=1) + 24 * 10
    soon = (datetime.now(UTC) - START) / timedelta(hours=1) + 2
    tied = [10.0, 20.0, 30.0, 40.0]
    pay(
        tmp_path,
        [
            (None, 1, 1, 1.0),
            (None, None, 1, 1.0),
            (1, None, 1, 1.0),
            (1, future, 1, 1.0),
            (1, soon, 1, 1.0),
            *((1, 1, None, amount) for amount in tied),
            (1, 1, None, tied[0]),
            *((1, 1, 2, amount) for amount in tied),
            (1, 1, 3, None),
            (2, 1, 3, 5.0),
        ],
    )
    [result] = store.build()
    counts = (result.rows_read, result.null_keys, result.null_times, result.future, result.ties_dropped, result.rows_written)
    assert counts == (16, 2, 1, 1, 7, 4)
    # Spark's own aggregate over its own hash says which of the tied rows stays.
    query = "SELECT max_by(a, xxhash64(a)) FROM VALUES (10D), (20D), (30D), (40D) AS t(a)"
    [[winner]] = spark.sql(query).collect()
    found = stored(store, "user_id", "event_timestamp", "created_timestamp", "amount")
    assert {repr(row) for row in found} == {
        repr(row) for row in [(1, 1.0, None, winner), (1, 1.0, 2.0, winner), (1, 1.0, 3.0, None), (2, 1.0, 3.0, 5.0)]
    }


@pytest.mark.parametrize(
    ("start", "end", "code"),
    [
        (None, datetime.now(UTC) + timedelta(days=3), "SFS-408"),
        (at(0), datetime.now(UTC) + timedelta(days=3), "SFS-408"),
        (at(2), at(2), "SFS-409"),
        (at(3), at(2), "SFS-409"),
        (None, datetime(2024, 1, 1), "SFS-409"),  # noqa: DTZ001  # what is to be refused
    ],
)
def test_an_impossible_interval_is_refused_before_anything_is_written(
    store: FeatureStore, start: datetime | None, end: datetime, code: str
):
    """An end far in the future, a start not before the end, a time without zone: no table, and no note of a build."""
    with pytest.raises(InvalidError) as caught:
        store.build(start=start, end=end)
    assert (caught.value.code, caught.value.exit_code) == (code, ExitCode.INVALID)
    assert not Path(table_path(store)).exists()
    assert store.missing(end=at(1)) == {"spend@1": [Interval(BEGINNING, at(1))]}


def test_an_empty_source_gives_an_empty_table(store: FeatureStore):
    """No rows is no error: the interval is done, and the table is there to be read."""
    [result] = store.build(end=at(1))
    assert (result.rows_read, result.rows_written) == (0, 0)
    assert stored(store, "user_id") == []
    assert store.missing(end=at(1)) == {"spend@1": []}


def test_the_layout_is_what_every_reader_relies_on(spark: SparkSession, tmp_path: Path):
    """Rows lie in the bucket of their key bytes, sorted in each file, with time statistics; any Delta reader opens it."""
    columns = {"name": pa.string(), "number": pa.int32(), "ts": INSTANT, "loaded_at": INSTANT, "amount": pa.float64()}
    rows = [
        (name, number, at(hour), at(loaded), hour * 1.0)
        for hour in (3, 1, 2)
        for name in ("b", "a", "é", "")
        for number in (7, -1, 12)
        for loaded in (9, None, 8)
    ]
    write_delta(tmp_path / "raw", columns, rows)
    definitions = """
        item = Entity("item", [Field("name", String), Field("number", Int32)])
        raw = DeltaSource("raw", path="raw", timestamp_field="ts", created_timestamp_field="loaded_at")
        prices = FeatureView("prices", item, [Field("amount", Float64)], raw)
    """
    store = open_project(tmp_path, definitions, spark, settings="offline: {buckets: 4}")
    store.apply()
    store.build(end=at(10))
    view = store.registry.state().views["prices"]
    table = DeltaTable(table_path(store, "prices"))

    files = [Path(table_path(store, "prices"), name) for name in table.file_uris()]
    buckets = [int(file.parent.name.removeprefix("_bucket=")) for file in files]
    assert len(set(buckets)) == len(files) > 1
    read = 0
    for file, bucket in zip(files, buckets, strict=True):
        found = pq.read_table(file, partitioning=None)
        order = [
            (row["name"].encode(), row["number"], row["event_timestamp"], row["created_timestamp"] is not None, row)
            for row in found.to_pylist()
        ]
        assert [row[:4] for row in order] == sorted(row[:4] for row in order)
        assert {zlib.crc32(key_bytes((row["name"], row["number"]), view.keys)) % 4 for *_, row in order} == {bucket}
        event = pq.ParquetFile(file).metadata.row_group(0).column(found.schema.get_field_index("event_timestamp"))
        assert event.physical_type == "INT64"
        assert event.statistics.min == at(1)
        assert event.statistics.max == at(3)
        read += found.num_rows
    assert read == len(rows) == polars.read_delta(table_path(store, "prices")).height

    protocol = table.protocol()
    assert protocol.min_reader_version == 1
    assert "deletionVectors" not in (protocol.writer_features or [])
    assert table.metadata().configuration["delta.columnMapping.mode"] == "none"
    [commit] = [entry for entry in table.history() if entry["operation"] == "WRITE"]
    assert json.loads(commit["userMetadata"]) == {
        "view": "prices@1",
        "build": 1,
        "interval": ["beginning", "2024-01-01T10:00:00Z"],
        "in_order": True,
    }


DRIFTS = {
    "a column is gone": ({"user_id": pa.int64(), "ts": INSTANT, "loaded_at": INSTANT}, ["'amount'"]),
    "a key became text": ({**PAYMENTS, "user_id": pa.string()}, ["'user_id'"]),
    "only the case differs": (
        {"user_id": pa.int64(), "ts": INSTANT, "loaded_at": INSTANT, "Amount": pa.float64()},
        ["'amount'"],
    ),
    "a number would lose digits": ({**PAYMENTS, "amount": pa.int64()}, ["'amount'"]),
    "a time lost its zone": ({**PAYMENTS, "ts": pa.timestamp("us")}, ["'ts'"]),
    "all at once": (
        {"user_id": pa.string(), "ts": pa.timestamp("us"), "amount": pa.string()},
        ["ts", "loaded_at", "user_id", "amount"],
    ),
}


def test_a_source_that_drifted_is_refused_before_anything_is_written(store: FeatureStore, tmp_path: Path):
    """Every column that is missing or no longer fits is named, all at once; the table keeps its version and rows."""
    pay(tmp_path, [(1, 1, 1, 1.0)])
    store.build(end=at(2))
    before = DeltaTable(table_path(store)).version()
    for name, (columns, named) in DRIFTS.items():
        write_delta(tmp_path / "raw" / "payments", columns, [])
        with pytest.raises(InvalidError) as caught:
            store.build(end=at(3))
        assert caught.value.exit_code == ExitCode.INVALID, name
        assert len(caught.value.problems) == len(named), name
        assert {problem.code for problem in caught.value.problems} <= {"SFS-402", "SFS-403", "SFS-406"}, name
        for word in named:
            assert word in str(caught.value), name
        assert store.missing(end=at(3)) == {"spend@1": [Interval(at(2), at(3))]}, name
    assert DeltaTable(table_path(store)).version() == before


def test_a_narrower_column_of_the_source_is_widened(store: FeatureStore, tmp_path: Path):
    """A source with int and float columns fills bigint and double ones without loss."""
    narrow = {**PAYMENTS, "user_id": pa.int32(), "amount": pa.float32()}
    write_delta(tmp_path / "raw" / "payments", narrow, [(-(2**31), at(1), at(1), 0.5)])
    store.build(end=at(2))
    assert stored(store, "user_id", "amount") == [(-(2**31), 0.5)]


def test_a_declared_type_narrower_than_the_source_is_refused(spark: SparkSession, tmp_path: Path):
    """A bigint column declared Int32 would lose digits: SFS-403, and no table."""
    pay(tmp_path, [(1, 1, 1, 1.0)])
    store = open_project(tmp_path, SPEND.replace("Int64", "Int32"), spark)
    store.apply()
    with pytest.raises(InvalidError, match=r"SFS-403.*'user_id'.*declared int32.*bigint"):
        store.build(end=at(2))
    assert not Path(table_path(store)).exists()


def test_one_failing_view_does_not_stop_the_others(spark: SparkSession, tmp_path: Path):
    """The rest is built and reported in PartlyDoneError (exit 7); the same command then does only what failed."""
    definitions = """
        user = Entity("user", [Field("user_id", Int64)])
        payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts")
        absent = DeltaSource("absent", path="raw/absent", timestamp_field="ts")
        first = FeatureView("first", user, [Field("amount", Float64)], payments)
        second = FeatureView("second", user, [Field("amount", Float64)], absent)
        third = FeatureView("third", user, [Field("amount", Float64)], payments)
    """
    pay(tmp_path, [(1, 1, 1, 1.0)])
    store = open_project(tmp_path, definitions, spark)
    store.apply()
    with pytest.raises(PartlyDoneError) as caught:
        store.build(end=at(2))
    assert caught.value.exit_code == ExitCode.PARTLY_DONE
    assert [(problem.code, problem.what.startswith("second@1: ")) for problem in caught.value.problems] == [("SFS-401", True)]
    assert "raw/absent" in str(caught.value)
    assert [(result.view, result.rows_written) for result in caught.value.results] == [("first@1", 1), ("third@1", 1)]
    runs = {run["subject"]: run for run in store.registry.runs()}
    assert {subject: run["state"] for subject, run in runs.items()} == {
        "first@1": "done",
        "second@1": "failed",
        "third@1": "done",
    }
    assert "SFS-401" in runs["second@1"]["details"]["error"]
    assert runs["third@1"]["details"]["results"][0]["rows_written"] == 1

    write_delta(tmp_path / "raw" / "absent", PAYMENTS, [(1, at(1), at(1), 1.0)])
    assert [result.view for result in store.build(end=at(2))] == ["second@1"]


FUNCTION = """
    def doubled(rows):
        # {comment}
        return rows.selectExpr("user_id", "ts", "loaded_at", "{factor} * amount AS amount")


    user = Entity("user", [Field("user_id", Int64)])
    payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts", created_timestamp_field="loaded_at")
    spend = FeatureView("spend", user, [Field("amount", Float64)], payments, transformation=doubled)
"""


def test_a_function_that_is_not_the_applied_one_is_never_run(spark: SparkSession, tmp_path: Path):
    """Another text of the function: SFS-405 until it is applied as a version of its own; a comment changes nothing."""
    pay(tmp_path, [(1, 1, 1, 1.0)])
    store = open_project(tmp_path, FUNCTION.format(comment="twice", factor=2), spark)
    store.apply()
    same = open_project(tmp_path, FUNCTION.format(comment="a word", factor=2), spark)
    same.build(end=at(2))
    other = open_project(tmp_path, FUNCTION.format(comment="twice", factor=3), spark)
    with pytest.raises(InvalidError, match="SFS-405"):
        other.build(end=at(3))
    other.apply()
    other.build(end=at(3))
    assert stored(other, "amount", version=1) == [(2.0,)]
    assert stored(other, "amount", version=2) == [(3.0,)]


def test_a_changed_schema_builds_a_table_of_its_own(spark: SparkSession, tmp_path: Path):
    """Version 2 gets its own table; a service goes on reading version 1, which is still built for it."""
    service = '\n    model = FeatureService("model", [spend])\n'
    pay(tmp_path, [(1, 1, 1, 1.0)])
    first = open_project(tmp_path, SPEND + service, spark)
    first.apply()
    first.build(end=at(2))
    second = open_project(tmp_path, SPEND.replace('"amount", Float64', '"cents", Int64') + service, spark)
    second.apply()
    columns = {**PAYMENTS, "cents": pa.int64()}
    write_delta(tmp_path / "raw" / "payments", columns, [(1, at(hour), at(hour), 1.0, 100) for hour in (1, 2)])
    assert sorted(result.view for result in second.build(end=at(3))) == ["spend@1", "spend@2"]
    assert stored(second, "event_timestamp", "amount", version=1) == [(1, 1.0), (2, 1.0)]
    assert stored(second, "event_timestamp", "cents", version=2) == [(1, 100), (2, 100)]

    spine = spark.sql("SELECT 1L AS user_id, timestamp_micros(1704074400000000) AS event_timestamp")
    job = second.get_historical_features(spine, "model")
    assert job.to_spark_df().columns == ["user_id", "event_timestamp", "amount"]
    assert "feature table spend@1" in job.explain()


class _Watched(Registry):
    """The registry, with something happening before a build begins or is noted as done."""

    def before_begin(self) -> None: ...

    def before_done(self) -> None: ...

    def begin_build(self, view: ViewSpec, interval: Interval) -> int:
        build = super().begin_build(view, interval)
        self.before_begin()
        return build

    def finish_build(self, view: ViewSpec, build: int, state: str, details: Any) -> None:
        if state == "done":
            self.before_done()
        super().finish_build(view, build, state, details)


def watched(store: FeatureStore) -> _Watched:
    """Open the project's registry anew as one that can be watched, and let the store use it."""
    registry = _Watched(store.environment.registry_url, store.project)
    vars(store)["registry"] = registry  # where the cached property keeps it
    return registry


def test_a_build_killed_between_commit_and_note_is_done_again(store: FeatureStore, tmp_path: Path):
    """The rows are in the table but nobody knows: the next run replaces them by the same rows, none twice."""
    pay(tmp_path, [(1, 1, 1, 1.0), (2, 1, 1, 2.0)])
    registry = watched(store)

    def killed() -> None:
        raise KeyboardInterrupt

    registry.before_done = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        store.build(end=at(2))
    committed = stored(store, "user_id", "event_timestamp", "created_timestamp", "amount")
    assert len(committed) == 2
    assert store.missing(end=at(2)) == {"spend@1": [Interval(BEGINNING, at(2))]}
    assert store.registry.runs()[0]["state"] == "interrupted"

    del registry.before_done
    store.build(end=at(2))
    assert stored(store, "user_id", "event_timestamp", "created_timestamp", "amount") == committed
    assert store.missing(end=at(2)) == {"spend@1": []}


def test_two_builds_of_one_interval_at_once_leave_each_row_once(spark: SparkSession, store: FeatureStore, tmp_path: Path):
    """Both write at the same time: each row is there once, and a loser is told that it lost and may try again."""
    pay(tmp_path, [(user, 1, 1, float(user)) for user in range(20)])
    store.build(end=at(1))
    both_began = threading.Barrier(2, timeout=60)
    stores = [FeatureStore(tmp_path, "test", spark=spark) for _ in range(2)]
    for each in stores:
        watched(each).before_begin = both_began.wait  # type: ignore[assignment,method-assign]

    def build(each: FeatureStore) -> SparkFSError | None:
        try:
            each.build(start=at(1), end=at(2))
        except SparkFSError as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(build, stores))
    losers = [error for error in outcomes if error is not None]
    assert len(losers) < 2
    for error in losers:
        assert isinstance(error, ConflictError)
        assert error.problems[0].fix
    assert stored(store, "user_id", "amount") == [(user, float(user)) for user in range(20)]
    assert store.missing(end=at(2)) == {"spend@1": []}


def test_two_builds_of_different_intervals_at_once_both_commit(
    spark: SparkSession, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The later one's files are written once and committed after the other's: nobody has to run again."""
    pay(tmp_path, [(user, hour, hour, float(user)) for user in range(20) for hour in (0, 1, 2)])
    store.build(end=at(1))
    other, commit, left = FeatureStore(tmp_path, "test", spark=spark), Transaction.commit, [1]

    def patched(self: Transaction, *arguments: Any) -> int:
        if left[0]:
            left[0] = 0
            other.build(start=at(2), end=at(3))
        return commit(self, *arguments)

    monkeypatch.setattr(Transaction, "commit", patched)
    [result] = store.build(start=at(1), end=at(2))
    table = DeltaTable(table_path(store))
    assert (result.rows_written, result.table_version, table.version()) == (20, 3, 3)
    assert Counter(stored(store, "event_timestamp", "_build")) == {(0, 1): 20, (1, 2): 20, (2, 3): 20}
    assert len(list(Path(table_path(store)).rglob("*.parquet"))) == len(table.file_uris())
    assert store.missing(end=at(3)) == {"spend@1": []}


def test_a_table_that_asks_more_of_a_writer_is_left_to_delta(spark: SparkSession, store: FeatureStore, tmp_path: Path):
    """With a constraint on the table Delta's own writer writes, and checks it; rows, ties and counts are the same."""
    rows = [(user, hour, hour, float(x)) for user in range(5) for hour in (0, 1, 2) for x in range(4)]
    pay(tmp_path, rows)
    [before] = store.build(end=at(3))
    assert before.why_delta is None
    columns = ["user_id", "event_timestamp", "created_timestamp", "amount"]
    expected = stored(store, *columns)
    table = spark.read.format("delta").load(table_path(store))
    assert table.count() == 15
    spark.sql(f"ALTER TABLE delta.`{table_path(store)}` ADD CONSTRAINT small CHECK (amount < 10)")
    [again] = store.build(start=at(1), end=at(3))
    assert again.why_delta
    assert (again.rows_written, again.ties_dropped, again.rows_read) == (10, 30, 60)
    assert stored(store, *columns) == expected
    assert "why_delta" not in again.to_row()
    pay(tmp_path, [(1, 1, 1, 99.0)])
    with pytest.raises(SparkFSError, match="constraint"):
        store.build(start=at(1), end=at(3))
    assert stored(store, *columns) == expected


def test_rows_are_found_by_their_exact_times(spark: SparkSession, store: FeatureStore, tmp_path: Path):
    """Delta skips files by the statistics that builds write: no row of a microsecond's time is lost by that, in any reader."""
    instants = [0, 1, 999, 1_000, 1_001, 999_999, 3_600_000_000 - 1]
    pay(tmp_path, [(n, micros / 3_600_000_000, None, 1.0) for n, micros in enumerate(instants)])
    store.build(end=at(1))
    table = spark.read.format("delta").load(table_path(store))
    frame = polars.scan_delta(table_path(store))
    for n, micros in enumerate(instants):
        instant = START + timedelta(microseconds=micros)
        literal = f"timestamp_micros({int(instant.timestamp()) * 1_000_000 + instant.microsecond})"
        assert [row["user_id"] for row in table.where(f"event_timestamp = {literal}").collect()] == [n]
        assert [row["event_timestamp"] for row in table.where(f"user_id = {n}").collect()] == [instant.replace(tzinfo=None)]
        assert frame.filter(polars.col("event_timestamp") == instant).collect()["user_id"].to_list() == [n]


def test_a_build_that_lost_does_not_bring_older_rows_back(
    spark: SparkSession, store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its source was read before the winner's: SFS-410, also right after an upkeep, and the newer rows stay."""
    pay(tmp_path, [(user, 1, 1, 1.0) for user in range(20)])
    store.build(end=at(1))
    store.build(end=at(2))
    store.optimize(buckets=4)
    other, commit, left = FeatureStore(tmp_path, "test", spark=spark), Transaction.commit, [1]

    def patched(self: Transaction, *arguments: Any) -> int:
        if left[0]:
            left[0] = 0
            pay(tmp_path, [(user, 1, 1, 2.0) for user in range(20)])
            other.build(start=at(1), end=at(2))
        return commit(self, *arguments)

    monkeypatch.setattr(Transaction, "commit", patched)
    with pytest.raises(ConflictError, match="SFS-410"):
        store.build(start=at(1), end=at(2))
    assert set(stored(store, "amount")) == {(2.0,)}


def test_rows_at_the_very_end_of_an_interval_are_left_alone_by_the_next(store: FeatureStore, tmp_path: Path):
    """A microsecond before the end: bounds in the log are exact, so the next build touches no older file."""
    last = timedelta(microseconds=1) / timedelta(hours=1)
    pay(tmp_path, [(user, hour - last, None, 1.0) for user in range(20) for hour in (1, 2, 3)])
    files: set[str] = set()
    for end in (1, 2, 3):
        store.build(end=at(end))
        now = set(DeltaTable(table_path(store)).file_uris())
        assert files < now
        files = now
    assert len(stored(store, "user_id")) == 60


def test_rows_too_wide_for_arrow_batches_are_left_to_delta(spark: SparkSession, tmp_path: Path):
    """50,000 rows of 4096 floats would take 800 MB in one batch; in batches of fewer rows workers write them."""
    definitions = """
        user = Entity("user", [Field("user_id", Int64)])
        raw = DeltaSource("raw", path="raw/payments", timestamp_field="ts")
        faces = FeatureView("faces", user, [Field("face", Embedding(4096))], raw)
    """
    columns = {"user_id": pa.int64(), "ts": INSTANT, "face": pa.list_(pa.float32())}
    write_delta(tmp_path / "raw" / "payments", columns, [(user, at(1), [float(user)] * 4096) for user in range(3)])
    store = open_project(tmp_path, definitions, spark)
    store.apply()
    settings = [f"spark.sql.execution.arrow.max{unit}PerBatch" for unit in ("Records", "Bytes")]
    before = [spark.conf.get(setting) for setting in settings]
    try:
        for rows, size, by_delta in (
            ("50000", "2147483647", True),
            ("0", "2147483647", True),
            ("2000", "2147483647", False),
            ("50000", "64MB", False),
        ):
            for setting, value in zip(settings, (rows, size), strict=True):
                spark.conf.set(setting, value)
            [built] = store.build(start=at(0), end=at(2))
            assert (built.rows_written, built.why_delta is not None) == (3, by_delta), (rows, size)
            found = stored(store, "user_id", "face", view="faces")
            assert [(user, len(face), face[-1]) for user, face in found] == [(n, 4096, float(n)) for n in range(3)]
    finally:
        for setting, was in zip(settings, before, strict=True):
            spark.conf.set(setting, was or "")
