"""The checksum of rows: what makes it another one, and what does not."""

from __future__ import annotations

import itertools
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars
import pytest
from deltalake import write_deltalake
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from spark_fs.datasets.content import checksum, checksum_measures, row_digest

#: By type, values that are all different; null comes with each.
VALUES: dict[str, list[str]] = {
    "boolean": ["true", "false"],
    "int": ["0", "1", "-1"],
    "bigint": ["0", "1", "9223372036854775807"],
    "float": ["0.0", "1.5", "float('nan')", "float('inf')"],
    "double": ["0.0D", "1.5D", "double('nan')", "double('-inf')"],
    "decimal(38,2)": ["0", "1.00", "-99999999999999999999999999999999999.99"],
    "string": ["''", "'a'", "'A'", "'\\u0000'", "' '", "'ä'"],
    "binary": ["X''", "X'00'", "X'0000'"],
    "date": ["DATE'0001-01-01'", "DATE'9999-12-31'"],
    "timestamp": ["TIMESTAMP'2024-01-01 00:00:00Z'", "TIMESTAMP'2024-01-01 00:00:00.000001Z'"],
    "timestamp_ntz": ["TIMESTAMP_NTZ'2024-01-01 00:00:00'", "TIMESTAMP_NTZ'1900-01-01 00:00:00'"],
    "array<int>": ["array()", "array(1)", "array(1, 2)", "array(2, 1)", "array(1, null)", "array(null, 1)", "array(null)"],
    "array<string>": ["array('ab', 'c')", "array('a', 'bc')", "array('abc')", "array('')", "array()"],
    "array<array<int>>": [
        "array(array(1), array(2))",
        "array(array(1, 2))",
        "array(array(), array(1, 2))",
        "array(array(1, 2), null)",
    ],
    "struct<x:int,y:int>": ["struct(1, null)", "struct(null, 1)", "struct(null, null)", "struct(1, 1)"],
    "map<string,int>": ["map()", "map('a', 1)", "map('a', null)", "map('a', 1, 'b', 2)", "map('a', 2, 'b', 1)"],
    "variant": ["parse_json('1')", "parse_json('\"1\"')", "parse_json('{\"a\": 1}')", "parse_json('null')"],
}


def rows_of(spark: SparkSession, kind: str, values: list[str]) -> DataFrame:
    return spark.sql(" UNION ALL ".join(f"SELECT CAST({value} AS {kind}) AS value" for value in values))


@pytest.mark.parametrize("kind", VALUES)
def test_different_values_have_different_digests(spark: SparkSession, kind: str):
    """Null, empty, zero, other order, other places of nulls: all are told apart."""
    frame = rows_of(spark, kind, [*VALUES[kind], "null"])
    digests = [row["digest"] for row in frame.select(row_digest(frame.schema, ["value"]).alias("digest")).collect()]
    assert len(set(digests)) == len(digests) == len(VALUES[kind]) + 1


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("double", ["0.0D", "-0.0D"]),
        ("array<double>", ["array(0.0D)", "array(-0.0D)"]),
        ("map<string,int>", ["map('a', 1, 'b', 2)", "map('b', 2, 'a', 1)"]),
        ("variant", ['parse_json(\'{"a": 1, "b": 2}\')', 'parse_json(\'{"b":2,"a":1}\')']),
        ("decimal(20,2)", ["1.5", "1.50"]),
    ],
)
def test_equal_values_have_one_digest(spark: SparkSession, kind: str, values: list[str]):
    """However they are written."""
    frame = rows_of(spark, kind, values)
    assert len({row[0] for row in frame.select(row_digest(frame.schema, ["value"])).collect()}) == 1


def test_where_nulls_are_counts(spark: SparkSession):
    """In rows of 70 columns, in each single one and in each pair; a column more is another row."""
    names = [f"c{n}" for n in range(70)]
    nulls = [set(), *({n} for n in range(70)), *(set(pair) for pair in itertools.combinations((0, 1, 62, 63, 69), 2))]
    frame = spark.createDataFrame(
        [Row(*(None if n in gone else 7 for n in range(70))) for gone in nulls], ", ".join(f"{n} int" for n in names)
    )
    assert frame.select(row_digest(frame.schema, names)).distinct().count() == len(nulls)
    whole = frame.where("c69 IS NULL AND c0 IS NOT NULL AND c1 IS NOT NULL AND c62 IS NOT NULL AND c63 IS NOT NULL")
    assert whole.select(F.count_if(row_digest(frame.schema, names) == row_digest(frame.schema, names[:-1]))).first()[0] == 0


def test_a_checksum_is_the_same_by_every_writer_and_reader(spark: SparkSession, tmp_path: Path):
    """Rows written by Spark, by deltalake and by polars, in other orders and files, nullable or not: one checksum."""
    rows = spark.range(1_000).selectExpr(
        "id", "CAST(id AS STRING) AS text", "IF(id % 7 = 0, NULL, id / 3) AS share", "timestamp_micros(id * 1234567) AS at",
        "array(id, NULL, 1) AS list", "CAST(id AS DECIMAL(12,3)) AS money",
    )  # fmt: skip
    rows.write.format("delta").save(str(tmp_path / "spark"))
    table = rows.toArrow()
    write_deltalake(str(tmp_path / "deltalake"), table.take(list(range(999, -1, -1))), target_file_size=4_000)
    polars.DataFrame(table).sort("text").write_delta(str(tmp_path / "polars"))
    found = {name: sum_of(spark.read.format("delta").load(str(tmp_path / name))) for name in ("spark", "deltalake", "polars")}
    assert set(found.values()) == {sum_of(rows)}, found
    assert sum_of(rows.limit(999)) != sum_of(rows) != sum_of(rows.union(rows.limit(1)))
    assert sum_of(rows.limit(0)) == "0" * 16
    assert Decimal(int(sum_of(rows), 16)) > 0


def sum_of(rows: DataFrame) -> str:
    counts: Any = rows.agg(*checksum_measures(row_digest(rows.schema, rows.columns), "content")).first()
    return checksum(counts.asDict(), "content")
