"""Versions of a feature table that Delta gives no more: by VACUUM, by retention, by the cleaning of its log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from spark_fs.errors import SparkFSError
from spark_fs.files import feature_table_path
from spark_fs.offline.tables import FeatureTable
from spark_fs.online import server
from tests.project import open_project, write

UTC = timezone.utc
END = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
START = END - timedelta(days=30)
SPEND = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = FileSource("payments", path="data/payments", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("amount", Int64)], payments)
"""
AMOUNTS = pa.schema([("user_id", pa.int64()), ("at", pa.timestamp("us", tz="UTC")), ("amount", pa.int64())])
CONF = "spark.databricks.delta"
ENFORCED = f"{CONF}.vacuum.enforceTimeTravelWithinDeletedFileRetentionDuration"


@pytest.fixture
def fs(tmp_path: Path, spark: SparkSession) -> Iterator[FeatureStore]:
    """An applied project with the one view ``spend``; its embedded server is stopped afterwards."""
    store = open_project(tmp_path, SPEND, spark)
    store.apply()
    yield store
    server.stop(tmp_path / ".spark_fs")


def put(folder: Path, rows: Sequence[tuple[Any, ...]]) -> None:
    """Make ``rows`` all that the source holds."""
    write(folder / "data" / "payments" / "_SUCCESS", "")
    columns = [pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), AMOUNTS, strict=True)]
    pq.write_table(pa.table(columns, schema=AMOUNTS), folder / "data" / "payments" / "part.parquet")


def online(fs: FeatureStore, users: Sequence[int]) -> list[Any]:
    """The published amounts of the users, or the status."""
    response = fs.get_online_features(["spend:amount"], {"user_id": list(users)})
    pairs = zip(response.to_dict()["amount"], response.statuses["amount"], strict=True)
    return [value if status == "PRESENT" else status for value, status in pairs]


def path_of(fs: FeatureStore) -> str:
    return feature_table_path(fs.environment.offline_root, fs.registry.state().require_view("spend"))


@contextmanager
def setting(spark: SparkSession, name: str, value: str) -> Iterator[None]:
    """A Spark setting for the block."""
    spark.conf.set(name, value)
    try:
        yield
    finally:
        spark.conf.unset(name)


@contextmanager
def vacuumed(spark: SparkSession, path: str) -> Iterator[None]:
    """The files of older versions are removed."""
    with setting(spark, f"{CONF}.retentionDurationCheck.enabled", "false"):
        spark.sql(f"VACUUM delta.`{path}` RETAIN 0 HOURS")
    yield


@contextmanager
def log_cleaned(spark: SparkSession, path: str) -> Iterator[None]:
    """Delta cleans its log at a checkpoint, of what is older than the retention; it goes by whole days."""
    old = time.time() - 40 * 86_400
    for file in Path(path, "_delta_log").iterdir():
        if file.is_file():
            os.utime(file, (old, old))
    # From now on each commit is a checkpoint.
    spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.checkpointInterval' = '1')")
    spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('spark_fs.note' = 'x')")
    assert not Path(path, "_delta_log", f"{1:020}.json").exists()
    yield


WAYS: dict[str, Callable[[SparkSession, str], Any]] = {"vacuum": vacuumed, "log": log_cleaned}


@pytest.fixture
def cleaned(fs: FeatureStore, tmp_path: Path, spark: SparkSession, request: pytest.FixtureRequest) -> Iterator[FeatureStore]:
    """What was published is a version of some before the newest one, and cannot be read any more."""
    put(tmp_path, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)
    put(tmp_path, [(1, START, 11), (3, START, 30)])
    fs.build(start=START, end=END)
    put(tmp_path, [(1, START, 12), (3, START, 30)])
    fs.build(start=START, end=END)
    published = fs.registry.published(fs.registry.state().require_view("spend"))
    assert published is not None
    with WAYS[request.param](spark, path_of(fs)):
        view = fs.registry.state().require_view("spend")
        with pytest.raises(Exception, match=r"DELTA_|FILE_NOT_EXIST"):
            FeatureTable(spark, path_of(fs), view).read(published.table_version).collect()
        yield fs


@pytest.mark.parametrize("cleaned", WAYS, indirect=True)
def test_a_run_does_without_the_version_and_says_so(cleaned: FeatureStore) -> None:
    """All rows are offered; that user 2 has lost its row cannot be known; the next run is as ever."""
    (result,) = cleaned.materialize_incremental(END)
    assert "is gone" in result.note
    assert online(cleaned, [1, 2, 3]) == [12, 20, 30]
    assert cleaned.materialize_incremental(END)[0].note == ""


@pytest.mark.parametrize("cleaned", WAYS, indirect=True)
def test_an_audit_ends_with_what_to_do_and_that_helps(cleaned: FeatureStore) -> None:
    """What should be online cannot be told: no fault is made up, nothing is noted as found; a repair mends it."""
    with pytest.raises(SparkFSError, match=r"SFS-622.*spend@1.*spark-fs repair spend@1") as caught:
        cleaned.audit()
    assert caught.value.exit_code == 1
    (result,) = cleaned.repair()
    assert (result.withdrawn, result.note) == (1, "")
    assert online(cleaned, [1, 2, 3]) == [12, "NOT_FOUND", 30]
    (found,) = cleaned.audit()
    assert (found.ok, found.keys) == (True, 2)


def test_upkeep_and_vacuum_take_nothing_away(fs: FeatureStore, tmp_path: Path, spark: SparkSession) -> None:
    """The published version is gone, but the newest one has the same rows: audits and runs go on."""
    put(tmp_path, [(user, START, user) for user in range(20)])
    fs.materialize(START, START + timedelta(hours=1))
    put(tmp_path, [(user, START + timedelta(days=1), user) for user in range(20)])
    fs.materialize_incremental(END)
    (before,) = fs.audit()
    fs.optimize()
    with vacuumed(spark, path_of(fs)):
        (found,) = fs.audit()
        assert (found.ok, found.keys) == (before.ok, before.keys) == (True, 20)
        assert found.table_version > before.table_version
        (result,) = fs.materialize_incremental(END)
        assert (result.rows_read, result.note) == (0, "")


def test_age_alone_takes_nothing_away(fs: FeatureStore, tmp_path: Path, spark: SparkSession) -> None:
    """Delta refuses versions older than VACUUM would keep; as long as the files are there, they are read all the same.

    So a table that is built once a week is compared with what was published of it.
    """
    put(tmp_path, [(1, START, 10), (2, START, 20)])
    fs.materialize_incremental(END)
    put(tmp_path, [(1, START, 11)])
    fs.build(start=START, end=END)
    path, view = path_of(fs), fs.registry.state().require_view("spend")
    published = fs.registry.published(view)
    assert published is not None
    spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.deletedFileRetentionDuration' = 'interval 1 seconds')")
    time.sleep(1.5)
    setting_before = spark.conf.get(ENFORCED, None)
    with pytest.raises(Exception, match="TIME_TRAVEL_BEYOND_DELETED_FILE_RETENTION"):
        spark.read.format("delta").option("versionAsOf", published.table_version).load(path).collect()
    (found,) = fs.audit()
    assert (found.ok, found.table_version) == (True, published.table_version)
    (result,) = fs.materialize_incremental(END)
    assert (result.note, result.applied, result.withdrawn) == ("", 1, 1)
    assert online(fs, [1, 2]) == [11, "NOT_FOUND"]
    assert spark.conf.get(ENFORCED, None) == setting_before


def test_a_setting_of_the_session_stays_as_it_is(fs: FeatureStore, tmp_path: Path, spark: SparkSession) -> None:
    """Whichever it is, also after an error."""
    put(tmp_path, [(1, START, 10)])
    fs.materialize_incremental(END)
    table = FeatureTable(spark, path_of(fs), fs.registry.state().require_view("spend"))
    for value in ("true", "false"):
        with setting(spark, ENFORCED, value):
            assert table.read(0).count() == 0
            with pytest.raises(Exception, match="DELTA_VERSION_NOT_FOUND"):
                table.read(99)
            assert spark.conf.get(ENFORCED) == value


def test_other_errors_of_an_audit_stay_what_they_are(fs: FeatureStore, tmp_path: Path) -> None:
    """A place where findings cannot be noted is no version that is gone."""
    put(tmp_path, [(1, START, 10)])
    fs.materialize_incremental(END)
    write(Path(fs.environment.offline_root) / fs.project / "_audits", "a file where a folder should be")
    with pytest.raises(SparkFSError) as caught:
        fs.audit()
    assert caught.value.code != "SFS-622"
