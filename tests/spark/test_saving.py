"""Saved datasets: what a report finds, what is refused, and what is left of saves that are repeated or cut off."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs import FeatureStore
from spark_fs.datasets import retrieval
from spark_fs.datasets.splits import KFold, TimeSplit
from spark_fs.errors import InvalidError
from spark_fs.intervals import UTC
from tests.project import open_project, write_delta

START = datetime(2024, 1, 1, tzinfo=UTC)
INSTANT = pa.timestamp("us", tz="UTC")
PAYMENTS = {"user_id": pa.int64(), "ts": INSTANT, "loaded_at": INSTANT, "amount": pa.float64(), "note": pa.string()}
SHOP = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts", created_timestamp_field="loaded_at")
    spend = FeatureView("spend", user, [Field("amount", Float64), Field("note", String)], payments, ttl=timedelta(hours=50))
    ever = FeatureView("ever", user, [Field("amount", Float64)], payments)
"""


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


@pytest.fixture(scope="module")
def store(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """100 users who each pay at hours 0 and 10, of odd ones it is known two hours later. ``spend`` is built, ``ever`` not."""
    folder = tmp_path_factory.mktemp("shop")
    rows = [(u, at(h), at(h + 2 * (u % 2)), u + h / 100, f"<{h}>") for u in range(100) for h in (0, 10)]
    write_delta(folder / "raw" / "payments", PAYMENTS, rows)
    opened = open_project(folder, SHOP, spark)
    opened.apply()
    opened.build(["spend"], end=at(20))
    return opened


def spine(spark: SparkSession, rows: list[tuple[int | None, datetime | None]], **more: list[Any]) -> DataFrame:
    users, times = zip(*rows, strict=True)
    table = pa.table({"user_id": pa.array(users, pa.int64()), "event_timestamp": pa.array(times, INSTANT), **more})
    return spark.createDataFrame(table)


def test_a_report_tells_ages_nulls_and_what_was_not_known_yet(spark: SparkSession, store: FeatureStore):
    """In the pass that writes: by view and part, with warnings for what a model would not have had, and for spoiled spines."""
    rows: list[tuple[int | None, datetime | None]] = [(u, at(11)) for u in range(50)]
    rows += [(0, at(11)), (1, None), (None, at(1)), (999, at(1)), (2, at(70))]
    labels = {"late": [float(u or 0) for u, _ in rows]}
    job = store.get_historical_features(spine(spark, rows, **labels), ["spend:amount", "spend:note"])
    split = TimeSplit((at(11), at(50)), ("before", "then", "after"))
    saved = job.save("reported", split=split, labels=["late"]).manifest
    report, view = saved.report, saved.report["views"]["spend"]
    assert (report["rows_in"], report["rows_out"]) == (55, 55)
    assert report["spine"] == {"null_times": 1, "duplicates": 1}
    assert (view["found"], view["latest_event_after_t_seconds"]) == (51, -3600.0)
    assert view["age_seconds"] == {"min": 3600.0, "median": 3600.0, "p99": 3600.0, "max": 3600.0}
    assert (view["not_yet_known"], view["not_yet_known_share"]) == (25, round(25 / 51, 6))
    assert view["null_share"] == {name: round(4 / 55, 6) for name in ("amount", "note")}
    assert view["null_share_by_split"]["amount"] == {"before": 1.0, "then": 0.0, "after": 1.0}
    assert report["joined_again"]["rows"] > 10
    assert saved.split is not None
    assert (saved.split.rows, saved.split.none) == ({"before": 2, "then": 51, "after": 1}, 1)
    assert report["labels"]["late"]["amount"]["correlation"] > 0.99
    told = " ".join(report["warnings"])
    for said in (
        "1 of 55 rows have the keys",
        "1 of 55 rows have no time",
        "49.0% of the values were not known",
        "goes along with",
    ):
        assert said in told
    known = store.get_historical_features(spine(spark, rows), ["spend:amount"], known_at=True).save("known").manifest
    assert known.report["views"]["spend"]["not_yet_known"] == 0
    assert not any("not known" in warning for warning in known.report["warnings"])
    assert store.datasets.verify("reported").identical
    assert store.datasets.verify("known").identical


def test_a_split_is_a_column_and_its_parts_are_read_by_name(spark: SparkSession, store: FeatureStore):
    """By all readers; in batches too, all rows once, in an order that the seed decides."""
    job = store.get_historical_features(spine(spark, [(u, at(11)) for u in range(100)]), ["spend:amount"])
    dataset = job.save("parted", split=KFold(4))
    counts = dataset.manifest.split.rows  # type: ignore[union-attr]
    assert sum(counts.values()) == 100
    for name, rows in counts.items():
        part = dataset[name]
        assert part.to_arrow().num_rows == part.to_polars().height == part.to_spark_df().count() == len(part.to_df()) == rows
    with pytest.raises(InvalidError, match=r"SFS-518.*Did you mean 'fold3'"):
        dataset["fold33"]

    def users(seed: int | None) -> list[int]:
        batches = list(dataset.to_batches(7, seed=seed))
        assert max(batch.num_rows for batch in batches) <= 7
        return [user for batch in batches for user in batch.column("user_id").to_pylist()]

    assert sorted(users(None)) == sorted(users(1)) == list(range(100))
    assert users(1) == users(1) != users(2)
    with pytest.raises(InvalidError, match=r"SFS-518.*without a split"):
        store.get_historical_features(spine(spark, [(1, at(1))]), ["spend:amount"]).save("whole")["train"]


def test_a_save_of_the_same_is_the_version_that_is_there(spark: SparkSession, store: FeatureStore):
    """Also by another strategy and partitioning; its files do not stay. Another description or row is another version."""
    rows = spine(spark, [(u, at(11)) for u in range(20)])

    def save(frame: DataFrame, strategy: str = "auto", **more: Any) -> int:
        return store.get_historical_features(frame, ["spend:amount"], strategy=strategy).save("same", **more).version

    assert save(rows) == save(rows) == save(rows.repartition(5), "window") == 1
    table = Path(store._offline.dataset("same").path)
    assert len(list(table.glob("*.parquet"))) == len(DeltaTable(str(table)).file_uris())
    assert save(rows, description="for churn") == 2
    assert save(rows.limit(19)) == 3
    assert [(saved["version"], saved["rows"]) for saved in store.datasets.list() if saved["name"] == "same"] == [
        (1, 20), (2, 20), (3, 19),
    ]  # fmt: skip


def test_a_save_that_is_cut_off_leaves_all_or_nothing(
    spark: SparkSession, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
):
    """Before the commit nobody sees anything of it; after it the next save knows it, also where its notes were lost."""
    job = store.get_historical_features(spine(spark, [(1, at(11))]), ["spend:amount"])
    table = Path(store._offline.dataset("cut").path)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("spark_fs.datasets.saving._report", stop)
        with pytest.raises(KeyboardInterrupt):
            job.save("cut")
    assert store._offline.dataset("cut").manifests() == {}
    assert list(table.glob("*.parquet")) == []
    with monkeypatch.context() as patched:
        patched.setattr("spark_fs.datasets.saving._note", stop)
        with pytest.raises(KeyboardInterrupt):
            job.save("cut")
    with pytest.raises(InvalidError, match="SFS-303"):
        store.get_dataset("cut")
    assert job.save("cut").version == 1
    assert store.get_dataset("cut").manifest.to_json() == json.loads((table / "_manifests" / "1.json").read_text())


def test_a_result_that_cannot_be_right_is_not_saved(spark: SparkSession, store: FeatureStore, monkeypatch: pytest.MonkeyPatch):
    """Wrong values, values from after a row's time, a spine that gives other rows each time: SFS-517, nothing is there."""
    rows = spine(spark, [(u, at(11)) for u in range(100)])
    execute = retrieval.execute

    def wrong_values(*args: Any) -> DataFrame:
        return execute(*args).withColumn("amount", F.col("amount") + 1)

    def of_the_future(*args: Any) -> DataFrame:
        return execute(*args).withColumn("_sfs_event_0", F.col("_sfs_event_0") + F.expr("INTERVAL 2 HOURS"))

    for name, spoilt, said in (("wrong", wrong_values, "amount has another value"), ("future", of_the_future, "from after")):
        with monkeypatch.context() as patched:
            patched.setattr(retrieval, "execute", spoilt)
            with pytest.raises(InvalidError, match=f"SFS-517.*{said}"):
                store.get_historical_features(rows, ["spend:amount"]).save(name)
        assert store._offline.dataset(name).manifests() == {}
        assert list(Path(store._offline.dataset(name).path).glob("*.parquet")) == []

    coin = F.udf(lambda: random.random() < 0.5, "boolean").asNondeterministic()
    tossed = spark.range(4_000).where(coin()).selectExpr("id AS user_id", "TIMESTAMP'2024-01-02' AS event_timestamp")
    with pytest.raises(InvalidError, match=r"SFS-517.*other rows each time"):
        store.get_historical_features(tossed, ["ever:amount"]).save("restless")


def test_a_diff_tells_what_changed_and_where(spark: SparkSession, tmp_path: Path):
    """Between versions of one spine: what was asked, which tables were read, and rows and columns that came out otherwise."""
    rows = [(u, at(0), at(0), float(u), "old") for u in range(10)]
    write_delta(tmp_path / "raw" / "payments", PAYMENTS, rows)
    store = open_project(tmp_path, SHOP, spark)
    store.apply()
    store.build(["spend"], end=at(20))
    before = [(u, at(1)) for u in (0, 1, 2, 3, 3)]
    store.get_historical_features(spine(spark, before), ["spend:amount"]).save("d")
    more = [(1, at(0.5), at(0.5), 11.0, "new"), (3, at(0.5), at(0.5), 33.0, "new")]
    write_deltalake(str(tmp_path / "raw" / "payments"), pa.Table.from_pylist(
        [dict(zip(PAYMENTS, row, strict=True)) for row in more], pa.schema(PAYMENTS.items())), mode="append")  # fmt: skip
    store.build(["spend"], start=at(0), end=at(20))
    after = [(u, at(1)) for u in (1, 2, 3, 3, 3, 4)]
    store.get_historical_features(spine(spark, after), ["spend:amount", "spend:note"], known_at=True).save("d")

    found = store.datasets.diff("d", 1)
    assert found.rows == {"equal": 1, "changed": 3, "added": 2, "gone": 1}
    assert found.columns == {"amount": {"differing": 3, "mean_difference": pytest.approx((10 + 0 + 30 + 30) / 4)}}
    assert set(found.manifest) == {"column note", "spend: table_version", "spine rows", "spine checksum", "known_at"}
    assert (found.manifest["column note"], found.manifest["known_at"]) == ((None, "string"), (False, True))
    assert not found.is_equal
    same = store.datasets.diff("d", 2, 2)
    assert same.is_equal
    assert same.rows == {"equal": 6, "changed": 0, "added": 0, "gone": 0}


def test_a_deleted_version_is_gone_and_its_number_is_not_given_again(spark: SparkSession, store: FeatureStore):
    """The newest one or one in between; the others stay what they were."""
    for users in (10, 20, 30):
        store.get_historical_features(spine(spark, [(u, at(11)) for u in range(users)]), ["spend:amount"]).save("numbered")
    table = Path(store._offline.dataset("numbered").path)
    files = len(list(table.glob("*.parquet")))
    for version in (3, 1):
        assert store.datasets.delete("numbered", version).version == version
        with pytest.raises(InvalidError, match="SFS-303"):
            store.datasets.get("numbered", version)
        assert not (table / "_manifests" / f"{version}.json").exists()
    assert store.datasets.get("numbered").version == 2
    assert store.datasets.verify("numbered").identical
    assert len(list(table.glob("*.parquet"))) < files
    job = store.get_historical_features(spine(spark, [(u, at(11)) for u in range(30)]), ["spend:amount"])
    assert job.save("numbered").version == 4
    assert [saved["version"] for saved in store.datasets.list() if saved["name"] == "numbered"] == [2, 4]
    assert store.datasets.verify("numbered", 2).identical
    store.datasets.delete("numbered", 4)
    assert DeltaTable(str(table)).to_pyarrow_table().num_rows == 0
    with pytest.raises(InvalidError, match="SFS-303"):
        store.datasets.delete("numbered", 4)


def test_a_dataset_is_exported_once(spark: SparkSession, store: FeatureStore, tmp_path: Path):
    """Its rows as Parquet and its manifest, into a folder of its own."""
    job = store.get_historical_features(spine(spark, [(u, at(11)) for u in range(20)]), ["spend:amount"])
    dataset = job.save("exported", split=KFold(2))
    written = dataset.export(str(tmp_path / "out"))
    assert sorted(map(Path, written)) == sorted((tmp_path / "out").iterdir())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == dataset.manifest.to_json()
    rows = pa.concat_tables(pa.parquet.read_table(file) for file in written if file.endswith(".parquet"))
    assert rows.sort_by("user_id").to_pylist() == dataset.to_arrow().sort_by("user_id").to_pylist()
    with pytest.raises(InvalidError, match="SFS-519"):
        dataset.export(str(tmp_path / "out"))
