"""Upkeep of the layout: one sorted file a bucket, other bucket counts, what runs beside it; real Spark and Delta."""

from __future__ import annotations

import json
import shutil
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta.tables import DeltaTable as SparkDeltaTable
from deltalake import DeltaTable

from spark_fs import FeatureStore, build
from spark_fs.build import OptimizeResult
from spark_fs.errors import ConflictError, InvalidError, SparkFSError
from spark_fs.files import feature_table_path
from spark_fs.intervals import UTC
from spark_fs.offline.sources import source_bytes
from spark_fs.offline.table_log import can_be_read_in_place, changed_since
from spark_fs.offline.tables import FeatureTable
from spark_fs.offline.transaction import Transaction
from spark_fs.online import server
from spark_fs.online.codec import key_bytes
from tests.project import open_project, write_delta

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

START = datetime(2024, 1, 1, tzinfo=UTC)
INSTANT = pa.timestamp("us", tz="UTC")
PAYMENTS = {"user_id": pa.int64(), "ts": INSTANT, "loaded_at": INSTANT, "amount": pa.float64()}
SPEND = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts", created_timestamp_field="loaded_at")
    spend = FeatureView("spend", user, [Field("amount", Float64)], payments)
"""
#: A view whose build waits, in Spark's worker, as long as the file ``hold`` is there; ``held`` tells that it does.
HELD = """
    import pathlib, time

    FOLDER = pathlib.Path("{folder}")


    def wait(batches):
        for batch in batches:
            if batch.num_rows and (FOLDER / "hold").exists():
                (FOLDER / "held").touch()
                while (FOLDER / "hold").exists():
                    time.sleep(0.05)
            yield batch


    def held(rows):
        return rows.mapInArrow(wait, rows.schema)


    user = Entity("user", [Field("user_id", Int64)])
    payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts", created_timestamp_field="loaded_at")
    spend = FeatureView("spend", user, [Field("amount", Float64)], payments, transformation=held)
"""
USERS = range(20)
HOURS = range(6)

Row = tuple[Any, ...]


def at(hours: float | None) -> datetime | None:
    return None if hours is None else START + timedelta(hours=hours)


def pay(folder: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Make the source hold these rows of (user, hour, hour of loading, amount)."""
    write_delta(folder / "raw" / "payments", PAYMENTS, [(user, at(ts), at(loaded), x) for user, ts, loaded, x in rows])


def every_hour(users: Iterable[int] = USERS, hours: Iterable[int] = HOURS) -> list[Row]:
    """For each user and hour one value of unknown loading time and one loaded later, in no order."""
    rows = [(user, hour, loaded, user + hour / 10) for hour in hours for user in users for loaded in (None, hour + 1)]
    return sorted(rows, key=lambda row: zlib.crc32(repr(row).encode()))


def opened(folder: Path, spark: SparkSession, definitions: str = SPEND, *, settings: str = "") -> FeatureStore:
    """An applied project over every hour's rows, with four buckets if the settings do not say otherwise."""
    pay(folder, every_hour())
    store = open_project(folder, definitions, spark, settings=settings or "offline: {buckets: 4}")
    store.apply()
    return store


@pytest.fixture(scope="module")
def built(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the project after three builds of two hours each; only to be copied."""
    folder = tmp_path_factory.mktemp("built")
    store = opened(folder, spark)
    for end in (2, 4, 6):
        store.build(end=at(end))
    return folder


@pytest.fixture
def store(spark: SparkSession, tmp_path: Path, built: Path) -> FeatureStore:
    """A copy of that project: all its paths are relative."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return FeatureStore(tmp_path, "test", spark=spark)


def table_of(store: FeatureStore) -> FeatureTable:
    view = store.registry.state().require_view("spend")
    return FeatureTable(store.spark, feature_table_path(store.environment.offline_root, view), view)


def rows_of(store: FeatureStore, version: int | None = None) -> list[Row]:
    """All rows but the bucket at a version, sorted; read without Spark."""
    columns = ["user_id", "event_timestamp", "created_timestamp", "amount", "_build"]
    found = DeltaTable(table_of(store).path, version=version).to_pyarrow_table(columns=columns).to_pylist()
    return sorted((tuple(row.values()) for row in found), key=repr)


def files_of(store: FeatureStore) -> dict[str, int]:
    """The newest version's data files and their buckets."""
    files = [name.removeprefix("file://") for name in DeltaTable(table_of(store).path).file_uris()]
    return {file: int(Path(file).parent.name.removeprefix("_bucket=")) for file in files}


def assert_in_order(store: FeatureStore) -> None:
    """One file a bucket, sorted by key and times, null first, with only that bucket's keys."""
    files, keys = files_of(store), table_of(store).view.keys
    assert max(Counter(files.values()).values()) == 1
    for file, bucket in files.items():
        rows = pq.read_table(file, partitioning=None).to_pylist()
        order = [
            (row["user_id"], row["event_timestamp"], row["created_timestamp"] is not None, row["created_timestamp"] or START)
            for row in rows
        ]
        assert order == sorted(order)
        crcs = {zlib.crc32(key_bytes((row["user_id"],), keys)) for row in rows}
        assert {crc % table_of(store).buckets() for crc in crcs} == {bucket}


def optimized(store: FeatureStore, buckets: int | None = None) -> OptimizeResult:
    (result,) = store.optimize(["spend"], buckets)
    return result


def before_commit(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], times: int = 1) -> None:
    """Let something happen when a rewrite has written its files and is about to commit; only so often."""
    commit, left = Transaction.commit, [times]

    def patched(self: Transaction, note: Any, *more: Any) -> int:
        if left[0] and "rewrite" in note:
            left[0] -= 1
            act()
        return commit(self, note, *more)

    monkeypatch.setattr(Transaction, "commit", patched)


# ---- what it leaves


def test_each_bucket_becomes_one_sorted_file_and_no_row_changes(store: FeatureStore) -> None:
    """Rows, their build numbers and older versions are as before; nothing is new to anyone; once more does nothing."""
    table, rows = table_of(store), rows_of(store)
    version, before = table.version(), files_of(store)
    assert max(Counter(before.values()).values()) == 3
    assert not can_be_read_in_place(table.commits())

    result = optimized(store)
    assert (result.rewritten, result.rows, result.files) == (4, len(rows), (len(before), 4))
    assert (result.table_version, result.buckets) == (version + 1, 4)
    assert rows_of(store) == rows
    assert_in_order(store)

    log = table.commits()
    assert changed_since(log, version) == []
    assert can_be_read_in_place(log)
    with Path(table.path, "_delta_log", f"{version + 1:020}.json").open() as lines:
        actions = [action for line in lines for kind, action in json.loads(line).items() if kind in ("add", "remove")]
    assert len(actions) == len(before) + 4
    assert not any(action["dataChange"] for action in actions)
    assert rows_of(store, version) == rows
    assert {row["_build"] for row in table.read(version).select("_build").distinct().collect()} == {1, 2, 3}

    again = optimized(store)
    assert (again.rewritten, again.rows, again.table_version) == (0, 0, version + 1)
    assert "nothing to do" in again.reason
    assert table.version() == version + 1
    assert [run["kind"] for run in store.registry.runs(2)] == ["optimize", "optimize"]


def test_only_buckets_that_need_it_are_rewritten(store: FeatureStore, tmp_path: Path) -> None:
    """After a build for one user, the files of all other buckets stay as they are."""
    optimized(store)
    before = files_of(store)
    pay(tmp_path, [*every_hour(), (1, 6, 7, 1.0)])
    store.build(end=at(7))
    result = optimized(store)
    assert (result.rewritten, result.files) == (1, (5, 4))
    after = files_of(store)
    assert len(set(before) - set(after)) == 1
    assert_in_order(store)


def test_a_table_that_delta_itself_compacted_is_sorted_again(store: FeatureStore) -> None:
    """One file a bucket is not enough: `OPTIMIZE` joins files as they come, which the log tells."""
    table, rows = table_of(store), rows_of(store)
    store.spark.conf.set("spark.databricks.delta.commitInfo.userMetadata", "nightly")
    try:
        SparkDeltaTable.forPath(store.spark, table.path).optimize().executeCompaction()
    finally:
        store.spark.conf.unset("spark.databricks.delta.commitInfo.userMetadata")
    assert max(Counter(files_of(store).values()).values()) == 1
    assert not can_be_read_in_place(table.commits())
    assert optimized(store).rewritten == 4
    assert rows_of(store) == rows
    assert_in_order(store)
    assert can_be_read_in_place(table.commits())


def test_a_build_without_rows_leaves_nothing_to_do(spark: SparkSession, tmp_path: Path) -> None:
    """Nor does one build alone."""
    store = opened(tmp_path, spark)
    store.build(end=at(-5))
    store.build(end=at(6))
    assert optimized(store).rewritten == 0


def test_what_a_build_takes_over_from_older_files_is_sorted_with_it(store: FeatureStore, tmp_path: Path) -> None:
    """A rebuilt interval in the middle of all files: the rows around it keep their builds, and nothing is left to do."""
    optimized(store)
    pay(tmp_path, every_hour(hours=(0, 2, 3, 4, 5)))
    before = {row for row in rows_of(store) if not at(1) <= row[1] < at(3)}
    store.build(start=at(1), end=at(3))
    rows = rows_of(store)
    assert len(rows) == len(USERS) * 10
    assert {row for row in rows if row[-1] != 4} == before
    assert_in_order(store)
    assert optimized(store).rewritten == 0


# ---- the number of buckets


@pytest.mark.parametrize("buckets", [2, 16])
def test_a_table_gets_another_number_of_buckets(store: FeatureStore, tmp_path: Path, buckets: int) -> None:
    """All rows move in one commit; older versions keep their number; the next build and joins follow the new one."""
    table, rows = table_of(store), rows_of(store)
    version = table.version()
    result = optimized(store, buckets)
    assert (result.buckets, result.rows, result.table_version) == (buckets, len(rows), version + 1)
    assert (table.buckets(), table.buckets(version), table.buckets(version + 1)) == (buckets, 4, buckets)
    assert rows_of(store) == rows == rows_of(store, version)
    assert_in_order(store)
    log = table.commits()
    assert changed_since(log, version) == []
    assert can_be_read_in_place(log)

    pay(tmp_path, every_hour(hours=[*HOURS, 6]))
    store.build(end=at(7))
    optimized(store)
    assert len(rows_of(store)) == len(rows) + 2 * len(USERS)
    assert_in_order(store)
    spine = store.spark.createDataFrame([(user, at(9)) for user in USERS], "user_id bigint, event_timestamp timestamp")
    joined = store.get_historical_features(spine, ["spend:amount"]).to_arrow().to_pylist()
    assert {row["user_id"]: row["amount"] for row in joined} == {user: user + 0.6 for user in USERS}

    assert optimized(store, buckets).rewritten == 0


def test_an_empty_table_gets_another_number_of_buckets(spark: SparkSession, tmp_path: Path) -> None:
    """There is nothing to move, only the number changes."""
    store = opened(tmp_path, spark)
    pay(tmp_path, [])
    store.build(end=at(1))
    result = optimized(store, 8)
    assert (result.rows, result.files, table_of(store).buckets()) == (0, (0, 0), 8)
    pay(tmp_path, every_hour())
    store.build(end=at(6))
    assert_in_order(store)


def test_an_impossible_number_of_buckets_is_refused(tmp_path: Path) -> None:
    """SFS-411, before anything is looked at."""
    store = open_project(tmp_path, SPEND)
    for buckets in (0, 3, 2048, -4):
        with pytest.raises(InvalidError, match="SFS-411"):
            store.optimize(buckets=buckets)


def test_views_without_a_table_are_passed_over(spark: SparkSession, tmp_path: Path) -> None:
    """Nothing is built yet, so there is nothing to optimize."""
    assert opened(tmp_path, spark).optimize() == []


def test_the_first_number_of_buckets_comes_from_the_size_of_the_source(spark: SparkSession, tmp_path: Path) -> None:
    """`auto`: a small Delta source gives 8; what the planner cannot measure has no size; a transformation changes nothing."""
    store = opened(tmp_path, spark, settings="offline: {buckets: auto}")
    store.build(end=at(2))
    assert table_of(store).buckets() == 8
    source = spark.read.format("delta").load(str(tmp_path / "raw" / "payments"))
    size = source_bytes(source)
    assert size is not None
    assert 0 < size < 100_000
    assert source_bytes(source.where("amount > 1").selectExpr("user_id * 2 AS x").groupBy("x").count()) == size
    assert source_bytes(spark.createDataFrame([(1,)], "x int").join(source)) is None


# ---- beside other work


def test_a_build_that_commits_first_is_kept(
    store: FeatureStore, tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of new hours while the files are being rewritten: both commit, and its rows are there."""
    pay(tmp_path, every_hour(hours=range(8)))
    other = FeatureStore(tmp_path, "test", spark=spark)
    before_commit(monkeypatch, lambda: other.build(end=at(8)))
    version = table_of(store).version()
    result = optimized(store)
    assert (result.table_version, result.rewritten, result.files[1]) == (version + 2, 4, 8)
    assert len(rows_of(store)) == len(every_hour(hours=range(8)))
    log = table_of(store).commits()
    assert [commit.build for commit in log if commit.version > version and commit.changes_rows] == [4]
    assert not can_be_read_in_place(log)
    optimized(store)
    assert_in_order(store)
    assert can_be_read_in_place(table_of(store).commits())


@pytest.mark.parametrize("buckets", [None, 8])
def test_what_a_build_replaced_meanwhile_does_not_come_back(
    store: FeatureStore, tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, buckets: int | None
) -> None:
    """A rebuild of hours that are being rewritten wins; the upkeep starts again on what it left."""
    pay(tmp_path, [(user, ts, loaded, 100.0 + amount) for user, ts, loaded, amount in every_hour()])
    other = FeatureStore(tmp_path, "test", spark=spark)
    before_commit(monkeypatch, lambda: other.build(start=at(1), end=at(5)))
    result = optimized(store, buckets)
    assert result.table_version == table_of(store).version()
    assert len(rows_of(store)) == len(every_hour())
    assert Counter(amount >= 100 for _, _, _, amount, _ in rows_of(store)) == {True: 160, False: 80}
    assert_in_order(store)


def test_an_upkeep_that_others_come_in_the_way_of_gives_up(
    store: FeatureStore, tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFS-410 after three attempts, with what the others wrote in the table and nothing of its own."""
    other = FeatureStore(tmp_path, "test", spark=spark)
    before_commit(monkeypatch, lambda: other.build(start=at(1), end=at(2)), times=9)
    with pytest.raises(ConflictError, match="SFS-410"):
        store.optimize()
    assert [commit.rewrite for commit in table_of(store).commits()] == [None] * 7
    assert len(rows_of(store)) == len(every_hour())


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Path]:
    """The file that holds builds of ``HELD`` up; gone afterwards, whatever fails."""
    yield tmp_path / "hold"
    (tmp_path / "hold").unlink(missing_ok=True)


@pytest.mark.parametrize("buckets", [None, 8])
def test_an_upkeep_may_commit_while_a_build_runs(spark: SparkSession, tmp_path: Path, hold: Path, buckets: int | None) -> None:
    """Delta refuses the build's commit after such a one; the build writes its rows once more, in the buckets there are now."""
    store = opened(tmp_path, spark, HELD.format(folder=tmp_path))
    store.build(end=at(2))
    store.build(end=at(4))
    hold.touch()
    other = FeatureStore(tmp_path, "test", spark=spark)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other.build, None, None, at(6))
        deadline = time.monotonic() + 60
        while not (tmp_path / "held").exists() and not running.done() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running.done()
        result = optimized(store, buckets)
        hold.unlink()
        (done,) = running.result(timeout=120)
    assert (result.rewritten, done.rows_written) == (buckets or 4, 2 * 2 * len(USERS))
    assert [commit.build for commit in table_of(store).commits() if commit.version > result.table_version] == [3]
    assert len(rows_of(store)) == len(every_hour())
    optimized(store)
    assert_in_order(store)


def test_a_build_never_leaves_rows_in_buckets_of_an_older_number(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redistributed after the build has looked at the number and before Delta looks at the table: it places its rows anew."""
    pay(tmp_path, every_hour(hours=range(8)))
    replace, between = FeatureTable.replace, threading.Event()

    def patched(self: FeatureTable, *arguments: Any) -> Any:
        if not between.is_set():
            between.set()
            build.optimize_table(self, 16)
        return replace(self, *arguments)

    monkeypatch.setattr(FeatureTable, "replace", patched)
    (built,) = store.build(end=at(8))
    assert built.rows_written == 2 * 2 * len(USERS)
    assert len(rows_of(store)) == len(every_hour(hours=range(8)))
    optimized(store)
    assert_in_order(store)


def test_an_interrupted_upkeep_leaves_the_table_as_it_was(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with all files written but not committed: same version, same rows; the next run does it."""
    rows, version = rows_of(store), table_of(store).version()

    def killed() -> None:
        raise KeyboardInterrupt

    before_commit(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        store.optimize()
    assert (table_of(store).version(), rows_of(store)) == (version, rows)
    assert store.registry.runs(1)[0]["state"] == "interrupted"
    optimized(store)
    assert rows_of(store) == rows
    assert_in_order(store)


def test_an_upkeep_that_would_lose_rows_commits_nothing(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFS-412: as many rows must be written as were read."""
    rows, version = rows_of(store), table_of(store).version()
    laid_out = FeatureTable._laid_out

    def losing(self: FeatureTable, frame: DataFrame, *arguments: Any, **options: Any) -> DataFrame:
        return laid_out(self, frame, *arguments, **options).where("user_id <> 7")

    monkeypatch.setattr(FeatureTable, "_laid_out", losing)
    with pytest.raises(SparkFSError, match="SFS-412"):
        store.optimize()
    assert (table_of(store).version(), rows_of(store)) == (version, rows)


# ---- after builds


def test_a_build_optimizes_a_table_with_too_many_files(spark: SparkSession, tmp_path: Path) -> None:
    """More than two files a bucket on average: the third build says that it rewrote them; the first two did not."""
    store = opened(tmp_path, spark, settings="offline: {buckets: 4}\nbuild: {max_files_per_bucket: 2}")
    results = [store.build(end=at(end))[0] for end in (2, 4, 6)]
    assert [result.optimized for result in results] == [False, False, True]
    assert results[2].files == (12, 4)
    assert results[2].to_json()["files"] == [12, 4]
    assert [result.to_row()["optimized"] for result in results] == [False, False, [12, 4]]
    assert len({tuple(result.to_row()) for result in results}) == 1
    assert "files" not in results[2].to_row()
    assert len(rows_of(store)) == len(every_hour())
    assert_in_order(store)
    assert store.registry.runs(1)[0]["details"]["results"][0]["optimized"] is True


def test_a_failed_upkeep_does_not_fail_the_build(spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are committed and the interval is noted; the result says what went wrong."""
    store = opened(tmp_path, spark, settings="offline: {buckets: 4}\nbuild: {max_files_per_bucket: 1}")

    def fails(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(build, "optimize_table", fails)
    store.build(end=at(2))
    (result,) = store.build(end=at(4))
    assert (result.optimized, result.files) == (False, None)
    assert "No space left" in (result.optimize_error or "")
    assert store.missing(end=at(4)) == {"spend@1": []}
    assert len(rows_of(store)) == 2 * 4 * len(USERS)


# ---- publishing


def test_nothing_is_new_to_publish_after_an_upkeep(store: FeatureStore, tmp_path: Path) -> None:
    """An incremental run reads no row, whatever moved; a full run, now file by file, finds all equal."""
    try:
        (first,) = store.materialize_incremental(at(6))
        assert first.applied == len(USERS)
        for buckets in (None, 8):
            optimized(store, buckets)
            (result,) = store.materialize_incremental(at(6))
            assert (result.rows_read, result.applied, result.stale) == (0, 0, 0)
            (whole,) = store.materialize(START - timedelta(days=1), START + timedelta(hours=6), everything=True)
            assert (whole.rows_read, whole.applied, whole.equal) == (len(every_hour()), 0, len(USERS))
    finally:
        server.stop(tmp_path / ".spark_fs")
