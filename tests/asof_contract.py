"""The contract of the as-of join as a checker: any join with the signature of ``asof_join`` can be put to it.

Two parts, each one Spark job: the written cases of tests/cases/pit.json, and random cases against the naive oracle.
A random case is told apart by its ``case`` column, which is one more join key. Times are microseconds in Python.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs.intervals import parse_instant, to_micros
from spark_fs.offline.compute import row_hash
from tests.oracle import naive_asof

Join = Callable[..., DataFrame]
Rows = list[dict[str, Any]]

ZONES = ("UTC", "America/New_York", "Asia/Kolkata")
SEED = 20240331
HOUR, DAY = 3_600_000_000, 86_400_000_000
VALUES = ("label", "rid", "value")

#: Instants where clocks change (New York, Berlin), the epoch, and a plain summer day.
_BASES = tuple(
    to_micros(parse_instant(text))
    for text in ("2025-11-02T05:30:00Z", "2024-03-31T01:00:00Z", "1970-01-01T00:00:00Z", "2024-07-01T12:00:00Z")
)
_STEPS = tuple(sign * step for step in (0, 1, 2, HOUR, HOUR - 1, HOUR + 1, DAY, DAY - 1, DAY + 1) for sign in (1, -1))

_ARROW = {
    "tinyint": pa.int8(),
    "smallint": pa.int16(),
    "int": pa.int32(),
    "bigint": pa.int64(),
    "double": pa.float64(),
    "string": pa.string(),
    "array<int>": pa.list_(pa.int32()),
}
_SPINE = {"row": "int", "case": "int", "a": "bigint", "b": "string", "event_timestamp": "timestamp", "note": "string"}
_FEATURES = {
    "case": "int",
    "a": "bigint",
    "b": "string",
    "event_timestamp": "timestamp",
    "created_timestamp": "timestamp",
    "label": "string",
    "rid": "int",
    "value": "double",
}


@dataclass(frozen=True)
class Rule:
    """One way to join the random rows."""

    on: tuple[str, ...]
    ttl_micros: int | None = None
    known_at: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``asof_join``."""
        return {
            "on": list(self.on),
            "created_time": "created_timestamp",
            "ttl": None if self.ttl_micros is None else timedelta(microseconds=self.ttl_micros),
            "known_at": self.known_at,
            "columns": list(VALUES),
        }


RULES = (
    Rule(("case", "a", "b")),
    Rule(("case", "a"), ttl_micros=0),
    Rule(("case", "a"), ttl_micros=1),
    Rule(("case", "a"), ttl_micros=HOUR),
    Rule(("case", "b"), ttl_micros=DAY),
    Rule(("case", "a", "b"), known_at=True),
    Rule(("case", "a"), ttl_micros=HOUR, known_at=True),
    Rule(("case", "b"), ttl_micros=DAY, known_at=True),
)


def frame(spark: SparkSession, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> DataFrame:
    """The rows as a DataFrame; timestamps are given in microseconds, so that no time zone of Python plays a part."""
    rows = list(rows)
    stored = {name: "bigint" if type_ == "timestamp" else type_ for name, type_ in columns.items()}
    schema = pa.schema([(name, _ARROW[type_]) for name, type_ in stored.items()])
    # From Arrow Spark makes a local relation, which costs no tasks of its own.
    raw = spark.createDataFrame(pa.table({name: [row.get(name) for row in rows] for name in columns}, schema))
    return raw.select(
        *(F.timestamp_micros(name).alias(name) if type_ == "timestamp" else F.col(name) for name, type_ in columns.items())
    )


def spine_frame(spark: SparkSession, spine: Rows) -> DataFrame:
    """Random spine rows as a DataFrame."""
    return frame(spark, spine, _SPINE)


def feature_frame(spark: SparkSession, rows: Rows) -> DataFrame:
    """Random feature rows as a DataFrame."""
    return frame(spark, rows, _FEATURES)


def random_cases(seed: int, count: int) -> tuple[Rows, Rows]:
    """Spine and feature rows of so many cases: few keys and instants, so that ties, nulls and edges are common."""
    rng = random.Random(seed)
    spine: Rows = []
    rows: Rows = []
    for case in range(count):
        base = rng.choice(_BASES)
        instants = [base + step for step in rng.sample(_STEPS, 6)]

        def keys(case: int = case) -> dict[str, Any]:
            return {
                "case": case,
                "a": rng.choice([1, 11, 111, None]),
                "b": rng.choice(["1", "11", "", "é", "1:1", None]),
            }

        def instant(instants: Sequence[int] = instants) -> int | None:
            return None if rng.random() < 0.05 else rng.choice(instants)

        for _ in range(rng.randrange(0, 14)):
            rows.append(
                {
                    **keys(),
                    "event_timestamp": instant(),
                    "created_timestamp": rng.choice([instant(), instant(), None]),
                    "label": rng.choice(["x", "y", "", None]),
                    "rid": len(rows),
                    "value": rng.choice([1.5, -0.5, None, math.nan, math.inf]),
                }
            )
            if rng.random() < 0.2:
                rows.append(dict(rows[-1]))
        for _ in range(rng.randrange(1, 6)):
            spine.append({**keys(), "row": len(spine), "event_timestamp": instant(), "note": rng.choice(["n", None])})
    return spine, rows


def joined_values(output: DataFrame, columns: Sequence[str] = VALUES) -> dict[int, list[tuple[Any, ...]]]:
    """The values by spine row, one tuple for each output row with that number; NaN as text so that it equals itself."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for row, *values in output.select("row", *columns).collect():
        found.setdefault(row, []).append(tuple(_comparable(value) for value in values))
    return found


def _comparable(value: Any) -> Any:
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def random_failures(spark: SparkSession, join: Join, seed: int, count: int) -> list[str]:
    """Where the join differs from the oracle on random cases, for every rule; one Spark job for all of them."""
    spine, rows = random_cases(seed, count)
    features, output = feature_frame(spark, rows), spine_frame(spark, spine)
    for number, rule in enumerate(RULES):
        output = join(output, features, **rule.arguments, prefix=f"{number}.")
    columns = {rule: [f"`{number}.{name}`" for name in VALUES] for number, rule in enumerate(RULES)}
    found = joined_values(output, [name for names in columns.values() for name in names])
    failures = []
    for number, rule in enumerate(RULES):
        hashes = _hashes(features, rule)
        hashed = [{**row, "hash": hashes[row["rid"]]} for row in rows]
        for row, winner in zip(spine, oracle_by_case(spine, hashed, rule), strict=True):
            expected = [tuple(_comparable(winner[name]) if winner else None for name in VALUES)]
            actual = [values[number * 3 : number * 3 + 3] for values in found.get(row["row"], [])]
            if actual != expected:
                failures.append(f"seed {seed}, {rule}, spine row {row}: expected {expected}, found {actual}")
    return failures


def oracle_by_case(spine: Rows, rows: Rows, rule: Rule) -> list[Mapping[str, Any] | None]:
    """The oracle's answer, case by case, for it is quadratic."""
    by_case: dict[int, Rows] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    return [
        naive_asof([row], by_case.get(row["case"], []), rule.on, ttl_micros=rule.ttl_micros, known_at=rule.known_at)[0]
        for row in spine
    ]


def _hashes(features: DataFrame, rule: Rule) -> dict[int, int]:
    """The row hash of each feature row: over all columns but keys and times."""
    values = [name for name in features.columns if name not in {*rule.on, "event_timestamp", "created_timestamp"}]
    return {row.rid: row.hash for row in features.select("rid", row_hash(values).alias("hash")).collect()}


def pit_cases() -> list[dict[str, Any]]:
    """The written cases."""
    path = Path(__file__).parent / "cases" / "pit.json"
    cases: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return cases


def pit_values(spark: SparkSession, join: Join) -> dict[str, list[list[Any]]]:
    """For each written case and spine row the values of all its output rows; one Spark job for all cases."""
    outputs = []
    cases = pit_cases()
    for case in cases:
        sample = [*case["rows"], *case["spine"]][0]
        keys = {key: "string" if isinstance(sample[key] or 0, str) else "bigint" for key in case["keys"]}
        times = {"event_timestamp": "timestamp", "created_timestamp": "timestamp"}
        rows = [_with_micros(row) for row in case["rows"]]
        spine = [{**_with_micros(row), "row": number} for number, row in enumerate(case["spine"])]
        output = join(
            frame(spark, spine, {**keys, "event_timestamp": "timestamp", "row": "int"}),
            frame(spark, rows, {**keys, **times, "value": "bigint"}),
            on=list(keys),
            created_time="created_timestamp",
            known_at=case.get("known_at", False),
            ttl=timedelta(seconds=case["ttl_seconds"]) if "ttl_seconds" in case else None,
        )
        outputs.append(output.select(F.lit(case["name"]).alias("case"), "row", F.col("value").cast("bigint")))
    found: dict[str, list[list[Any]]] = {case["name"]: [[] for _ in case["spine"]] for case in cases}
    for name, row, value in reduce(DataFrame.union, outputs).collect():
        found[name][row].append(value)
    return found


def _with_micros(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: to_micros(parse_instant(value)) if name.endswith("_timestamp") and value is not None else value
        for name, value in row.items()
    }


def pit_failure(case: Mapping[str, Any], found: Sequence[Sequence[Any]]) -> str:
    """What is wrong with the values found for a case, or an empty text."""
    tied = {row["value"] for row in case["rows"]}
    for number, (expected, values) in enumerate(zip(case["expected"], found, strict=True)):
        if len(values) != 1 or (values[0] not in tied if expected == "ANY" else values[0] != expected):
            return f"{case['name']} ({case['rule']}): spine row {number} expected {expected}, found {list(values)}"
    return ""


def contract_failures(spark: SparkSession, join: Join, seed: int = SEED, count: int = 300) -> list[str]:
    """All that is wrong with a join: the written cases, then the random ones."""
    found = pit_values(spark, join)
    written = [failure for case in pit_cases() if (failure := pit_failure(case, found[case["name"]]))]
    return written + random_failures(spark, join, seed, count)
