"""Training sets through the feature store: where rows come from, what may be asked, and what is saved."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from spark_fs import FeatureStore
from spark_fs.datasets.dataset import Dataset
from spark_fs.datasets.splits import RandomSplit
from spark_fs.datasets.verify import verify_dataset
from spark_fs.errors import InvalidError
from spark_fs.intervals import UTC, parse_instant
from tests.project import open_project, write_delta

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

START = datetime(2024, 1, 1, tzinfo=UTC)
INSTANT = pa.timestamp("us", tz="UTC")
PAYMENTS = {"user_id": pa.int64(), "ts": INSTANT, "loaded_at": INSTANT, "amount": pa.float64(), "note": pa.string()}
WEATHER = {"place": pa.string(), "ts": INSTANT, "temperature": pa.float64()}
SHOP = """
    user = Entity("user", [Field("user_id", Int64)])
    place = Entity("place", [Field("place", String)])
    payments = DeltaSource("payments", path="raw/payments", timestamp_field="ts", created_timestamp_field="loaded_at")
    reports = DeltaSource("reports", path="raw/weather", timestamp_field="ts")
    spend = FeatureView("spend", user, [Field("amount", Float64), Field("note", String)], payments, ttl=timedelta(hours=3))
    ever = FeatureView("ever", user, [Field("amount", Float64)], payments)
    weather = FeatureView("weather", place, [Field("temperature", Float64)], reports)
    trips = FeatureService("trips", [
        spend[["amount"]],
        weather.with_name("origin").with_join_key_map({"place": "from_place"}),
        weather.with_name("destination").with_join_key_map({"place": "to_place"}),
    ])
"""


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


@pytest.fixture(scope="module")
def store(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A small shop, applied, nothing built: each user pays at hours 0 and 1; two places report their weather."""
    folder = tmp_path_factory.mktemp("shop")
    payments = [(user, at(h), at(h), 10.0 * user + h, f"<{h}>") for user in (1, 2) for h in (0, 1)]
    write_delta(folder / "raw" / "payments", PAYMENTS, payments)
    write_delta(folder / "raw" / "weather", WEATHER, [("JFK", at(0), 1.0), ("JFK", at(2), 2.0), ("SFO", at(0), 15.0)])
    opened = open_project(folder, SHOP, spark)
    opened.apply()
    return opened


def spine_table(*rows: tuple[int | None, datetime | None], **columns: list[Any]) -> pa.Table:
    users, times = zip(*rows, strict=True) if rows else ((), ())
    return pa.table({"user_id": pa.array(users, pa.int64()), "event_timestamp": pa.array(times, INSTANT), **columns})


def in_text(table: pa.Table, by: str) -> str:
    """The rows in order, as text that tells NaN, -0.0 and null apart."""
    return repr(table.sort_by(by).to_pylist())


def random_rows(seed: int) -> tuple[list[tuple[Any, ...]], pa.Table]:
    """2,000 payments in which most (user, time, loaded) are there several times, and 2,000 spine rows at such times."""
    rng = random.Random(seed)
    times = [START + timedelta(minutes=rng.randrange(3_000), microseconds=rng.choice([0, 1])) for _ in range(20)]
    amounts = [None, 0.0, -0.0, float("nan"), float("inf"), 1.5, 2.5]

    def payment() -> tuple[Any, ...]:
        ts = rng.choice(times)
        loaded = rng.choice([None, ts, ts + timedelta(hours=2)])
        return rng.choice([*range(20), None]), rng.choice([ts, ts, None]), loaded, rng.choice(amounts), rng.choice("abc")

    moments = [*times, *(ts + timedelta(hours=3) for ts in times), *(ts - timedelta(microseconds=1) for ts in times)]
    rows = [(rng.choice([*range(24), None]), rng.choice([*moments, None])) for _ in range(2_000)]
    return [payment() for _ in range(2_000)], spine_table(*rows, row=list(range(2_000)))


def test_a_training_set_is_the_same_with_and_without_feature_tables(spark: SparkSession, tmp_path: Path):
    """From the source, beside too small a table, from tables: equal to the bit, ties included; explain says which."""
    seed = 20240229
    payments, spine = random_rows(seed)
    write_delta(tmp_path / "raw" / "payments", PAYMENTS, payments)
    write_delta(tmp_path / "raw" / "weather", WEATHER, [])
    store = open_project(tmp_path, SHOP, spark)
    store.apply()
    features = ["spend:amount", "spend:note", "ever:amount"]
    entity_df = spark.createDataFrame(spine)

    def look() -> tuple[str, str, str]:
        job = store.get_historical_features(entity_df, features, full_feature_names=True)
        known = store.get_historical_features(entity_df, features[:2], known_at=True)
        return in_text(job.to_arrow(), "row"), in_text(known.to_arrow(), "row"), job.explain()

    computed, computed_known, why = look()
    assert why.count("computed from source 'payments': no feature table was built") == 2
    assert computed.count("'spend__note': None") not in (0, spine.num_rows), "the case has both hits and misses"

    store.build(["spend", "ever"], end=at(20))
    partly = store.get_historical_features(entity_df, features, full_feature_names=True)
    assert partly.explain().count("no feature table covers the range") == 2

    dropped = sum(result.ties_dropped for result in store.build(["spend", "ever"]))
    assert dropped > 100, "the case has ties"
    stored, stored_known, why = look()
    assert why.count("feature table spend@1, Delta version ") == why.count("feature table ever@1, Delta version ") == 1
    assert stored == computed, f"seed {seed}"
    assert stored_known == computed_known, f"seed {seed}"
    for strategy, shown in (("auto", "colocated: "), ("colocated", "colocated: "), ("window", "window: ")):
        job = store.get_historical_features(entity_df, features, full_feature_names=True, strategy=strategy)
        assert job.explain().count(f"keys user_id: {shown}") == 1, job.explain()
        assert in_text(job.to_arrow(), "row") == computed, f"seed {seed}, {strategy}"


def test_a_strategy_that_cannot_be_is_refused(store: FeatureStore, spark: SparkSession):
    """A wrong name at once; colocated for a view without a table when the tables are looked at, before any row is joined."""
    spine = spark.createDataFrame(spine_table((1, at(1))))
    with pytest.raises(InvalidError, match=r"SFS-513.*'colocatd'"):
        store.get_historical_features(spine, ["spend:amount"], strategy="colocatd")
    job = store.get_historical_features(spine, ["spend:amount"], strategy="colocated")
    with pytest.raises(InvalidError, match="SFS-513"):
        job.to_spark_df()


def test_an_entity_dataframe_may_come_from_anywhere(spark: SparkSession, store: FeatureStore, tmp_path: Path):
    """Spark, pandas, SQL text, a Delta path, a Parquet path, a table name: the same rows, instants to the microsecond."""
    # Half past one in New York, the session's zone, happens twice that night.
    twice = [parse_instant("2024-11-03T05:30:00.000001Z"), parse_instant("2024-11-03T06:30:00.000001Z")]
    spine = spine_table((1, twice[0]), (2, twice[1]), (2, at(1)), (9, at(1)))
    write_deltalake(str(tmp_path / "delta"), spine)
    pq.write_table(spine, tmp_path / "rows.parquet")
    spark.sql("DROP TABLE IF EXISTS shop_spine")
    spark.createDataFrame(spine).write.format("delta").saveAsTable("shop_spine")
    kinds: dict[str, Any] = {
        "Spark": spark.createDataFrame(spine),
        "pandas": spine.to_pandas(),
        "SQL": "\n SELECT * FROM shop_spine WHERE user_id < 100",
        "Delta path": str(tmp_path / "delta"),
        "Parquet path": str(tmp_path / "rows.parquet"),
        "table": "shop_spine",
    }
    order = [("user_id", "ascending"), ("event_timestamp", "ascending")]
    expected = spine.append_column("amount", pa.array([11.0, 21.0, 21.0, None])).sort_by(order)
    try:
        for kind, entity_df in kinds.items():
            found = store.get_historical_features(entity_df, ["ever:amount"]).to_arrow().sort_by(order)
            assert found.to_pylist() == expected.to_pylist(), kind
    finally:
        spark.sql("DROP TABLE IF EXISTS shop_spine")


ONE = spine_table((1, at(1)))
WRONG_REQUESTS: dict[str, tuple[Any, Any, str, str]] = {
    "naive pandas time": (
        pd.DataFrame({"user_id": [1], "event_timestamp": [pd.Timestamp("2024-01-01")]}),
        ["spend:amount"],
        "SFS-506",
        r"event_timestamp.*tz_localize",
    ),
    "time as text": (
        ONE.to_pandas().astype({"event_timestamp": str}),
        ["spend:amount"],
        "SFS-506",
        "'event_timestamp'.*string",
    ),
    "no time": (ONE.select(["user_id"]).to_pandas(), ["spend:amount"], "SFS-504", "'event_timestamp' is missing"),
    "no key": (ONE.select(["event_timestamp"]).to_pandas(), ["spend:amount"], "SFS-504", "'user_id' is missing"),
    "key of another type": (ONE.to_pandas().astype({"user_id": str}), ["spend:amount"], "SFS-505", "'user_id' is string"),
    "unknown feature": (ONE.to_pandas(), ["spend:amout"], "SFS-501", "Did you mean 'amount'"),
    "unknown view": (ONE.to_pandas(), ["spent:amount"], "SFS-303", "Did you mean 'spend'"),
    "unknown version": (ONE.to_pandas(), ["spend@9:amount"], "SFS-303", "spend@9.*spend@1"),
    "unknown service": (ONE.to_pandas(), "trip", "SFS-303", "Did you mean 'trips'"),
    "a service in a list": (ONE.to_pandas(), ["trips"], "SFS-511", "'trips' does not name a feature"),
    "equal names": (ONE.to_pandas(), ["spend:amount", "ever:amount"], "SFS-503", "'amount'.*full_feature_names"),
    "a name of the spine": (
        ONE.append_column("note", pa.array(["x"])).to_pandas(),
        ["spend:note"],
        "SFS-503",
        "'note'.*entity DataFrame",
    ),
    "no entity DataFrame": (42, ["spend:amount"], "SFS-512", "int"),
    "SQL that does not run": ("SELECT FROM WHERE", ["spend:amount"], "SFS-512", "cannot be read"),
    "unknown table": ("nowhere", ["spend:amount"], "SFS-512", "nowhere"),
    "unknown path": ("raw/nowhere", ["spend:amount"], "SFS-512", "nowhere"),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_request_is_refused_before_any_job(spark: SparkSession, store: FeatureStore, name: str):
    """The error says what is wrong in the user's words, when the training set is asked for and not when it runs."""
    entity_df, features, code, said = WRONG_REQUESTS[name]
    with counted_jobs(spark) as jobs, pytest.raises(InvalidError, match=f"(?s){said}") as caught:
        store.get_historical_features(entity_df, features)
    assert caught.value.code == code
    assert jobs == []


def test_all_unknown_names_are_told_at_once(store: FeatureStore):
    """Two wrong features are two problems of one error; known_at needs a created time and says so."""
    with pytest.raises(InvalidError) as caught:
        store.get_historical_features(ONE.to_pandas(), ["spend:amout", "nothing:amount", "ever:amount"])
    assert [problem.code for problem in caught.value.problems] == ["SFS-501", "SFS-303"]
    with pytest.raises(InvalidError, match=r"SFS-507.*'origin'"):
        store.get_historical_features(trip_spine(store.spark), "trips", full_feature_names=True, known_at=True)


@pytest.mark.parametrize("kind", ["Spark", "pandas"])
def test_an_empty_spine_gives_an_empty_training_set(spark: SparkSession, store: FeatureStore, kind: str):
    """No rows, all columns; it can be saved like any other."""
    entity_df = spine_table().to_pandas() if kind == "pandas" else spark.createDataFrame(ONE).where("user_id < 0")
    job = store.get_historical_features(entity_df, ["spend:amount"])
    assert job.to_arrow().num_rows == 0
    dataset = job.save(f"empty_{kind}")
    assert dataset.manifest.rows == 0
    assert dataset.to_arrow().column_names == ["user_id", "event_timestamp", "amount"]


def trip_spine(spark: SparkSession) -> DataFrame:
    columns = {"from_place": ["JFK", "SFO"], "to_place": ["SFO", "JFK"]}
    return spark.createDataFrame(spine_table((1, at(1)), (2, at(2)), **columns))


def test_features_are_named_one_by_one_by_version_or_by_a_service(spark: SparkSession, store: FeatureStore):
    """A service may use one view twice, under two names and by two key columns; full names carry the alias."""
    job = store.get_historical_features(trip_spine(spark), "trips", full_feature_names=True)
    expected = [
        {"spend__amount": 11.0, "origin__temperature": 1.0, "destination__temperature": 15.0},
        {"spend__amount": 21.0, "origin__temperature": 15.0, "destination__temperature": 2.0},
    ]
    spine = trip_spine(spark).columns
    assert job.to_spark_df().columns == [*spine, *expected[0]]
    assert job.to_arrow().sort_by("user_id").select(list(expected[0])).to_pylist() == expected
    with pytest.raises(InvalidError, match=r"SFS-503.*'temperature'.*origin:temperature and destination:temperature"):
        store.get_historical_features(trip_spine(spark), "trips")

    service = store.load_repository().services["trips"]
    by_object = store.get_historical_features(trip_spine(spark), service, full_feature_names=True)
    assert by_object.to_spark_df().columns == job.to_spark_df().columns
    mixed = store.get_historical_features(
        ONE.to_pandas(), ["spend@1:note", "ever:amount", "spend:amount"], full_feature_names=True
    )
    # Grouped by view, in the order in which the views are first named.
    assert mixed.to_spark_df().columns[2:] == ["spend__note", "spend__amount", "ever__amount"]


def test_all_forms_of_the_result_agree(spark: SparkSession, store: FeatureStore):
    """pandas, Arrow, polars and Spark: the same columns and values, instants in UTC whatever the session's zone."""
    spine = spine_table((1, at(1)), (2, at(9)), (None, at(1)), row=[0, 1, 2])
    job = store.get_historical_features(spark.createDataFrame(spine), ["spend:amount", "ever:amount"], full_feature_names=True)
    arrow = job.to_arrow().sort_by("row")
    assert arrow.column_names == ["user_id", "event_timestamp", "row", "spend__amount", "ever__amount"]
    assert arrow["event_timestamp"].to_pylist() == [at(1), at(9), at(1)]
    assert arrow["spend__amount"].to_pylist() == [11.0, None, None]
    assert arrow["ever__amount"].to_pylist() == [11.0, 21.0, None]
    assert str(arrow.schema.field("event_timestamp").type) == "timestamp[us, tz=UTC]"
    assert job.to_polars().sort("row").to_dict(as_series=False) == arrow.to_pydict()
    assert job.to_spark_df().toArrow().sort_by("row").to_pydict() == arrow.to_pydict()
    pandas = job.to_df().sort_values("row")
    assert str(pandas["event_timestamp"].dt.tz) == "UTC"
    assert list(pandas["event_timestamp"]) == [at(1), at(9), at(1)]
    assert pandas["ever__amount"].fillna(-1).tolist() == [11.0, 21.0, -1.0]


@contextmanager
def counted_jobs(spark: SparkSession) -> Iterator[list[int]]:
    """The ids of the Spark jobs that this thread starts in the block, known at its end."""
    context, jobs = spark.sparkContext, []  # type: tuple[Any, list[int]]
    group = f"counted {random.random()}"
    context.setJobGroup(group, group)
    try:
        yield jobs
    finally:
        jobs += context.statusTracker().getJobIdsForGroup(group)
        context.setLocalProperty("spark.jobGroup.id", None)


def test_showing_a_training_set_starts_no_job_and_escapes_html(spark: SparkSession, store: FeatureStore):
    """A notebook shows a job and a dataset without running anything; the user's text never becomes markup."""
    sql = "SELECT 1L AS user_id, timestamp_seconds(0) AS event_timestamp, '<i>' AS `<script>` WHERE 1 < 2"
    with counted_jobs(spark) as jobs:
        job = store.get_historical_features(sql, ["spend:amount"])
        html = job._repr_html_()
    assert jobs == []
    assert "1 &lt; 2" in html
    assert "<script>" not in html
    with counted_jobs(spark) as jobs:
        dataset = job.save("shown")
    assert jobs != [], "jobs are counted"
    with counted_jobs(spark) as jobs:
        html = dataset._repr_html_()
    assert jobs == []
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert dataset.manifest.checksum in html


def test_each_save_is_a_version_that_never_changes(spark: SparkSession, store: FeatureStore):
    """Manifests in the registry and beside the table are equal; any reader gets the rows of each version, as they were."""
    spine = spine_table((1, at(1)), (9, at(1)))
    first = store.get_historical_features(spark.createDataFrame(spine), ["ever:amount"]).save(
        "churn", description="for churn", tags={"team": "growth"}
    )
    longer = pa.concat_tables([spine, spine_table((2, at(1)))])
    job = store.get_historical_features(spark.createDataFrame(longer), ["spend:amount", "spend:note"])
    second = job.save("churn")
    assert (first.version, second.version) == (1, 2)

    for dataset, rows, columns in ((first, 2, ["amount"]), (second, 3, ["amount", "note"])):
        got = store.get_dataset("churn", dataset.version)
        beside = Path(dataset.path, "_manifests", f"{dataset.version}.json")
        assert got.manifest == dataset.manifest
        assert got.manifest.to_json() == json.loads(beside.read_text())
        names = ["user_id", "event_timestamp", *columns]
        assert (got.to_arrow().num_rows, got.to_arrow().column_names) == (rows, names)
        assert polars.read_delta(got.path, version=got.manifest.delta_version).columns == names
        assert in_text(got.to_spark_df().toArrow(), "user_id") == in_text(got.to_arrow(), "user_id")
        verdict = store.datasets.verify("churn", dataset.version)
        assert verdict.identical, verdict
    assert store.get_dataset("churn").version == 2
    assert first.to_arrow().sort_by("user_id")["amount"].to_pylist() == [11.0, None]

    manifest = first.manifest
    assert manifest.features == ("ever@1:amount",)
    assert [(column.name, column.nulls) for column in manifest.columns] == [
        ("user_id", 0),
        ("event_timestamp", 0),
        ("amount", 1),
    ]
    assert (manifest.description, manifest.tags, manifest.spine.rows) == ("for churn", {"team": "growth"}, 2)
    commits = {entry["version"]: entry.get("userMetadata") for entry in DeltaTable(first.path).history()}
    assert json.loads(commits[manifest.delta_version])["manifest"] == {**manifest.to_json(), "delta_version": None}
    with pytest.raises(InvalidError, match=r"SFS-303.*churn@1, churn@2"):
        store.get_dataset("churn", 3)


def test_the_checksum_tells_content_not_order(spark: SparkSession, store: FeatureStore):
    """Other partitions and another order give the same checksum; a row more, less, twice or changed gives another."""
    rows = [(user, at(hour)) for user in (1, 2, 3) for hour in (0.5, 1, 1, 2)]
    changes = {"as is": rows, "less": rows[1:], "twice": [*rows, rows[0]], "changed": [(2, at(0.5)), *rows[1:]]}
    spines = {name: spark.createDataFrame(spine_table(*given)) for name, given in changes.items()}
    spines["turned"] = spines["as is"].repartition(3).orderBy("event_timestamp", ascending=False)
    saved = {name: store.get_historical_features(df, ["spend:amount"]).save("summed").manifest for name, df in spines.items()}
    checksums = {name: manifest.checksum for name, manifest in saved.items()}
    assert checksums.pop("turned") == checksums["as is"]
    assert len(set(checksums.values())) == 4
    assert saved["turned"].spine.checksum == saved["as is"].spine.checksum


def test_two_saves_at_once_are_two_versions(spark: SparkSession, store: FeatureStore):
    """Each has a manifest that fits the rows it wrote."""
    spines = [spark.createDataFrame(spine_table(*[(1, at(1))] * rows)) for rows in (1, 2)]
    started = threading.Barrier(2, timeout=60)

    def save(spine: DataFrame) -> Dataset:
        job = store.get_historical_features(spine, ["spend:amount"])
        job.explain()  # counts the spine, so that both come to the write together
        started.wait()
        return job.save("raced")

    with ThreadPoolExecutor(2) as pool:
        saved = list(pool.map(save, spines))
    assert sorted(dataset.version for dataset in saved) == [1, 2]
    assert [dataset.manifest.rows for dataset in saved] == [1, 2]
    for dataset in saved:
        assert store.datasets.verify("raced", dataset.version).identical


def test_verify_finds_what_somebody_else_changed(spark: SparkSession, store: FeatureStore):
    """A later version leaves a dataset as it is; other rows in its place, or another manifest, are told."""
    dataset = store.get_historical_features(spark.createDataFrame(ONE), ["spend:amount"]).save("checked")
    version, rows = dataset.manifest.delta_version, dataset.to_arrow()
    write_deltalake(dataset.path, rows.slice(0, 0), mode="overwrite")
    assert store.datasets.verify("checked").identical

    edited = verify_dataset(store._offline, dataset.manifest.model_copy(update={"rows": 2}))
    assert (edited.intact, edited.recomputed, edited.rows, edited.expected_rows) == (False, True, 1, 2)

    shutil.rmtree(dataset.path)
    changed = rows.set_column(2, "amount", pa.array([12.0]))
    for _ in range(version + 1):
        write_deltalake(dataset.path, changed, mode="overwrite")
    verdict = store.datasets.verify("checked")
    assert (verdict.ok, verdict.intact, verdict.recomputed, verdict.rows, verdict.differing_rows) == (False, False, False, 1, 2)
    assert verdict.checksum != verdict.expected_checksum == verdict.recomputed_checksum


def test_a_dataset_comes_out_the_same_whatever_has_happened_since(spark: SparkSession, tmp_path: Path):
    """Appends, corrections, upkeep and another strategy change nothing; a version that is gone is told, with its place."""
    rows = [(user, at(h), at(h), 10.0 * user + h, f"<{h}>") for user in (1, 2) for h in (0, 1)]
    write_delta(tmp_path / "raw" / "payments", PAYMENTS, rows)
    write_delta(tmp_path / "raw" / "weather", WEATHER, [("JFK", at(0), 1.0)])
    store = open_project(tmp_path, SHOP, spark)
    store.apply()
    store.build(["spend"], end=at(20))
    spine = spine_table((1, at(1)), (2, at(1)), (9, at(1)), (None, at(1)), (1, at(9)))
    entity_df = spark.createDataFrame(spine)
    built = store.get_historical_features(entity_df, ["spend:amount"]).save("built", split=RandomSplit((0.5, 0.5)))
    computed = store.get_historical_features(entity_df, ["ever:amount"]).save("computed")
    assert [origin.table_version for origin in built.manifest.origins] == [1]
    assert [origin.source_state for origin in computed.manifest.origins] == ["Delta version 0"]

    new = dict(zip(PAYMENTS, (1, at(0.5), at(0.5), 99.0, "new"), strict=True))
    write_deltalake(str(tmp_path / "raw" / "payments"), pa.Table.from_pylist([new], pa.schema(PAYMENTS.items())), mode="append")
    store.build(["spend"], start=at(0), end=at(20))
    store.optimize(["spend"])
    changed = store.get_historical_features(entity_df, ["spend:amount"]).save("built", split=RandomSplit((0.5, 0.5)))
    assert changed.version == 2
    for name in ("built", "computed"):
        verdict = store.datasets.verify(name, 1)
        assert verdict.identical, verdict
        assert verdict.notes == verdict.obstacles == ()
    stored_only = store.datasets.verify("built", 1, recompute=False)
    assert (stored_only.ok, stored_only.identical, stored_only.recomputed) == (True, False, None)

    table = store._offline.table(store.registry.state().require_view("spend"))
    for file in table.data_files(1):
        Path(file.removeprefix("file:")).unlink()
    verdict = store.datasets.verify("built", 1)
    assert (verdict.ok, verdict.identical, verdict.recomputed) == (True, False, None)
    assert "gone" in verdict.obstacles[0]


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "1st", "_hidden", "a.b"])
def test_a_name_that_cannot_be_a_folder_is_refused(store: FeatureStore, name: str):
    """SFS-509 before anything runs or is written."""
    job = store.get_historical_features(ONE.to_pandas(), ["spend:amount"])
    with pytest.raises(InvalidError, match="SFS-509"):
        job.save(name)
    assert not Path(store.environment.offline_root, store.project, "_datasets", name, "_delta_log").exists()
