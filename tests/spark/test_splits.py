"""Splits of real rows: what falls where, whatever else is there, and exactly in which shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timedelta, timezone
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from spark_fs.datasets.manifest import SPLIT
from spark_fs.datasets.splits import KFold, RandomSplit, SplitRule, TimeSplit, settle_split, split_column
from spark_fs.errors import InvalidError

START = datetime(2024, 1, 1, tzinfo=timezone.utc)
SCHEMA = pa.schema([("user", pa.int64()), ("place", pa.string()), ("t", pa.timestamp("us", tz="UTC")), ("late", pa.bool_())])
ROWS = [
    {"user": user, "place": "ab"[user % 2], "t": START + timedelta(days=day), "late": user % 3 == 0}
    for user in range(2_000)
    for day in range(2)
]


def frame_of(spark: SparkSession, rows: list[dict[str, Any]]) -> DataFrame:
    return spark.createDataFrame(pa.Table.from_pylist(rows, SCHEMA))


def parts_of(rule: SplitRule, frame: DataFrame) -> list[dict[str, Any]]:
    return [row.asDict() for row in frame.withColumn(SPLIT, split_column(rule, frame, "t")).collect()]


def test_cut_offs_belong_to_the_later_part_and_gaps_to_none(spark: SparkSession):
    """To the microsecond; rows without a time are of no part."""
    first, second, micro = START + timedelta(days=10), START + timedelta(days=20), timedelta(microseconds=1)
    rule = TimeSplit((first, second), gap=timedelta(days=1))
    times = {
        START - timedelta(days=9_999): "train",
        first - timedelta(days=1) - micro: "train",
        first - timedelta(days=1): None,
        first - micro: None,
        first: "validation",
        second - timedelta(days=1) - micro: "validation",
        second - timedelta(days=1): None,
        second: "test",
        second + timedelta(days=9_999): "test",
        None: None,
    }
    found = parts_of(rule, frame_of(spark, [{"user": 1, "place": "a", "t": t, "late": True} for t in times]))
    assert {row["t"] and row["t"].astimezone(timezone.utc): row[SPLIT] for row in found} == times


@pytest.mark.parametrize(
    "rule", [RandomSplit((0.8, 0.2), by=("user",)), KFold(4, by=("user",), seed=9)], ids=["random", "kfold"]
)
def test_an_entity_is_in_one_part_and_stays_there(spark: SparkSession, rule: SplitRule):
    """Whatever else is in the dataset, in what order, as int or bigint; shares are about right."""
    whole = {(row["user"], row[SPLIT]) for row in parts_of(rule, frame_of(spark, ROWS))}
    assert len(whole) == 2_000
    some = frame_of(spark, ROWS[1_000:1_400][::-1]).selectExpr("CAST(user AS INT) AS user", "t")
    assert {(row["user"], row[SPLIT]) for row in parts_of(rule, some)} <= whole
    sizes = Counter(part for _, part in whole)
    assert set(sizes) == set(rule.names)
    shares = rule.shares if isinstance(rule, RandomSplit) else [1 / rule.k] * rule.k
    for name, share in zip(rule.names, shares, strict=True):
        assert abs(sizes[name] / 2_000 - share) < 0.04
    (without,) = parts_of(rule, frame_of(spark, [{"user": None, "place": "a", "t": START, "late": True}]))
    assert without[SPLIT] is None


def test_other_seeds_and_columns_split_otherwise(spark: SparkSession):
    """And texts are not glued together: ('a', 'bc') is not ('ab', 'c')."""
    frame = frame_of(spark, ROWS)

    def parts(rule: SplitRule) -> list[str]:
        return [row[SPLIT] for row in sorted(parts_of(rule, frame), key=lambda row: (row["user"], row["t"]))]

    assert parts(RandomSplit((0.5, 0.5), by=("user",))) != parts(RandomSplit((0.5, 0.5), by=("user",), seed=1))
    assert len({(row["place"], row[SPLIT]) for row in parts_of(KFold(1_000, ("place",)), frame)}) == 2
    glued = spark.sql("SELECT 'a' AS x, 'bc' AS y, now() AS t UNION ALL SELECT 'ab', 'c', now()")
    assert len({row[SPLIT] for row in parts_of(KFold(1_000, ("x", "y")), glued)}) == 2


def test_strata_are_cut_exactly_and_keep_their_bounds(spark: SparkSession):
    """Each value has the shares to an entity; entities that are there stay where they are when others come."""
    frame = frame_of(spark, ROWS)
    rule = settle_split(RandomSplit((0.6, 0.2, 0.2), stratify="late"), frame, ["user"])
    assert isinstance(rule, RandomSplit)
    assert rule.by == ("user",)
    sizes: dict[bool, Counter[str]] = defaultdict(Counter)
    before = {(row["user"], row[SPLIT]) for row in parts_of(rule, frame)}
    for user, part in before:
        sizes[user % 3 == 0][part] += 1
    for late, users in ((True, 667), (False, 1_333)):
        for name, share in zip(rule.names, rule.shares, strict=True):
            assert abs(sizes[late][name] - share * users) <= 1

    new = [{"user": user, "place": "c", "t": START, "late": None if user % 2 else True} for user in range(5_000, 5_200)]
    grown = frame_of(spark, ROWS + new)
    again = settle_split(RandomSplit((0.6, 0.2, 0.2), stratify="late"), grown, ["user"], rule)
    assert isinstance(again, RandomSplit)
    assert set(again.bounds or {}) == {"true", "false", "null"}
    assert {(row["user"], row[SPLIT]) for row in parts_of(again, grown)} >= before
    # Another rule is cut anew.
    assert settle_split(RandomSplit((0.5, 0.5), stratify="late"), grown, ["user"], rule) == settle_split(
        RandomSplit((0.5, 0.5), stratify="late"), grown, ["user"]
    )


@pytest.mark.parametrize(
    ("rule", "keys", "said"),
    [
        (KFold(3, ("usr",)), [], "Did you mean 'user'"),
        (KFold(3), [], "no join keys"),
        (RandomSplit((0.5, 0.5), stratify="lat"), ["user"], "'lat'"),
        (RandomSplit((0.5, 0.5), stratify="t"), ["user"], "'t' changes within user"),
        (RandomSplit((0.5, 0.5), by=("user", "t"), stratify="user"), ["user"], "more than 1,000 values"),
        (KFold(3, ("share",)), [], "'share', which is double"),
    ],
)
def test_what_rows_cannot_be_split_by_is_refused(spark: SparkSession, rule: SplitRule, keys: list[str], said: str):
    """SFS-515 before anything is written."""
    frame = frame_of(spark, ROWS).selectExpr("*", "0.5D AS share")
    with pytest.raises(InvalidError, match=f"SFS-515.*{said}"):
        settle_split(rule, frame, keys)
