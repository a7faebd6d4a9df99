"""Spark writes the key bytes, Python asks for them: they must be the same."""

from __future__ import annotations

from datetime import date, datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest

from spark_fs.offline import compute
from spark_fs.online import codec
from spark_fs.spec import Column
from spark_fs.types import Bool, Bytes, Date, Int32, Int64, String, Timestamp

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

UTC = timezone.utc
VALUES: list[tuple[Column, list[Any]]] = [
    (
        Column("s", String),
        ["", "JFK", "null", "é", "e\u0301", "🛫", "a\x00b", "1:a", "{}", "a\r\nb", " x ", "x" * 70_000],
    ),
    (Column("y", Bytes), [b"", b"\x00\xff\xfe", b"12", bytearray(b"x")]),
    (Column("i", Int32), [0, -1, 2**31 - 1, -(2**31)]),
    (Column("l", Int64), [0, -1, 2**63 - 1, -(2**63)]),
    (Column("b", Bool), [True, False]),
    (
        Column("t", Timestamp),
        [
            datetime(1970, 1, 1, tzinfo=UTC),
            datetime(1900, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
            datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
            datetime(2025, 11, 2, 5, 30, tzinfo=UTC),  # half past one in New York, for the first time
            datetime(2025, 11, 2, 6, 30, tzinfo=UTC),  # and for the second
            datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        ],
    ),
    (Column("d", Date), [date(1970, 1, 1), date(1900, 1, 1), date(9999, 12, 31)]),
]
ALL = [column for column, _ in VALUES]


def of_spark(spark: SparkSession, keys: list[Column], rows: list[tuple[Any, ...]]) -> list[bytes]:
    from pyspark.sql import functions as F

    # Instants travel as microseconds, so that this session's zone and Python's cannot bend them on the way.
    plain = [
        [codec.to_micros(value) if isinstance(value, datetime) else value for value in (number, *row)]
        for number, row in enumerate(rows)
    ]
    types = ["bigint" if key.type.kind == "timestamp" else key.type.spark for key in keys]
    schema = ", ".join(["_row bigint", *(f"`{key.name}` {kind}" for key, kind in zip(keys, types, strict=True))])
    frame = spark.createDataFrame([tuple(row) for row in plain], schema)
    for key in keys:
        if key.type.kind == "timestamp":
            frame = frame.withColumn(key.name, F.timestamp_micros(F.col(f"`{key.name}`")))
    found = frame.select("_row", compute.key_bytes(keys).alias("key")).orderBy("_row").collect()
    return [bytes(row["key"]) for row in found]


@pytest.mark.parametrize(("column", "values"), VALUES, ids=[column.name for column, _ in VALUES])
def test_one_key(spark: SparkSession, column: Column, values: list[Any]) -> None:
    """For one join key of each type, Spark and Python give the same bytes, and different ones for different values."""
    rows = [(value,) for value in values]
    ours = [codec.key_bytes(row, [column]) for row in rows]
    assert of_spark(spark, [column], rows) == ours
    assert len(set(ours)) == len(values)


def test_composite_keys(spark: SparkSession) -> None:
    """The same for several keys of all types together, with separators and empty texts among them."""
    count = 24
    rows = [tuple(values[(row + place) % len(values)] for place, (_, values) in enumerate(VALUES)) for row in range(count)]
    assert of_spark(spark, ALL, rows) == [codec.key_bytes(row, ALL) for row in rows]
    pairs = [("a:", "b"), ("a", ":b"), ("1:a", ""), ("", "1:a")]
    texts = [Column("p", String), Column("q", String)]
    ours = [codec.key_bytes(pair, texts) for pair in pairs]
    assert of_spark(spark, texts, pairs) == ours
    assert len(set(ours)) == len(pairs)


def test_no_keys(spark: SparkSession) -> None:
    """A view without entities has one row, under the empty key."""
    assert of_spark(spark, [], [()]) == [codec.key_bytes([], [])] == [b""]
