"""The checker of the contract rejects as-of joins that are wrong in the ways as-of joins usually are."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import reduce
from operator import and_
from typing import Any

import pytest
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from spark_fs.offline import asof
from spark_fs.offline.asof import asof_join
from tests.asof_contract import SEED, VALUES, Join, random_failures

EVENT, CREATED = "event_timestamp", "created_timestamp"


def _ttl_exclusive(time: Column, event: Column, ttl: timedelta | None) -> Column:
    return F.unix_micros(time) - F.unix_micros(event) < F.lit(ttl // timedelta(microseconds=1)) if ttl else F.lit(True)


def _ttl_by_calendar(time: Column, event: Column, ttl: timedelta | None) -> Column:
    """Spark's own interval arithmetic, for which the day of a clock change is 23 or 25 hours long."""
    return event >= time - F.lit(ttl) if ttl else F.lit(True)


#: Wrong parts put in the place of right ones inside the join.
WRONG_PARTS: dict[str, dict[str, Any]] = {
    "< for <=": {"_SPINE_SIDE": -1},
    "no ttl": {"_fresh": lambda *_: F.lit(True)},
    "ttl exclusive": {"_fresh": _ttl_exclusive},
    "ttl by the session's calendar": {"_fresh": _ttl_by_calendar},
    "no last tie-break": {"row_hash": lambda _: F.lit(0)},
    "known_at takes the row known last": {"_newest_known": lambda values, _: F.last(values, ignorenulls=True)},
    "known_at orders by event time": {"_visible_from": lambda event, *_, **__: event},
}


def _created_ignored(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    created = CREATED if arguments["known_at"] else None
    return asof_join(spine, features.drop(*([] if created else [CREATED])), **{**arguments, "created_time": created})


def _null_created_last(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    if not arguments["known_at"]:
        features = features.withColumn(CREATED, F.coalesce(CREATED, F.timestamp_micros(F.lit(2**52))))
    return asof_join(spine, features, **arguments)


def _known_at_ignored(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    return asof_join(spine, features, **{**arguments, "known_at": False})


def _joined_text_keys(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    text = F.concat(*(F.col(key).cast("string") for key in arguments["on"]))
    features = features.withColumn("text_key", text).drop(*arguments["on"])
    return asof_join(spine.withColumn("text_key", text), features, **{**arguments, "on": "text_key"}).drop("text_key")


def _times_as_session_text(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    def through_text(frame: DataFrame, names: tuple[str, ...]) -> DataFrame:
        layout = "yyyy-MM-dd HH:mm:ss.SSSSSS"
        return frame.withColumns({name: F.to_timestamp(F.date_format(name, layout), layout) for name in names})

    return asof_join(through_text(spine, (EVENT,)), through_text(features, (EVENT, CREATED)), **arguments)


def _milliseconds(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    return asof_join(spine, features.withColumn(EVENT, F.date_trunc("millisecond", EVENT)), **arguments)


def _filled_column_by_column(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    for name in VALUES:
        spine = asof_join(spine, features.where(F.col(name).isNotNull()), **{**arguments, "columns": [name]})
    return spine


def _unmatched_dropped(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    joined = asof_join(spine, features, **arguments)
    return joined.where(F.col(f"`{arguments['prefix']}rid`").isNotNull())


def _spine_deduplicated(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    return asof_join(spine, features, **arguments).dropDuplicates([*arguments["on"], EVENT])


def _null_keys_match(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    filled: Mapping[str, Any] = {"a": 0, "b": "none"}
    keys = {key: value for key, value in filled.items() if key in arguments["on"]}
    return asof_join(spine.fillna(keys), features.fillna(keys), **arguments)


def _ties_multiply(spine: DataFrame, features: DataFrame, **arguments: Any) -> DataFrame:
    """A range join that keeps all rows of rank 1, as the plans of other feature stores do; without ttl and known_at."""
    if arguments["ttl"] or arguments["known_at"]:
        return asof_join(spine, features, **arguments)
    left, right = spine.alias("left"), features.alias("right")
    on = reduce(and_, (F.col(f"left.{key}") == F.col(f"right.{key}") for key in arguments["on"]))
    joined = left.join(right, on & (F.col(f"right.{EVENT}") <= F.col(f"left.{EVENT}")), "left")
    newest = Window.partitionBy("left.row").orderBy(F.desc(f"right.{EVENT}"), F.desc_nulls_last(f"right.{CREATED}"))
    ranked = joined.withColumn("rank", F.rank().over(newest)).where("rank = 1")
    values = [F.col(f"right.{name}").alias(arguments["prefix"] + name) for name in arguments["columns"]]
    return ranked.select("left.*", *values)


#: Joins that are wrong as a whole, or handle their input wrongly.
WRONG_JOINS: dict[str, Join] = {
    "created ignored": _created_ignored,
    "null created last": _null_created_last,
    "known_at ignored": _known_at_ignored,
    "keys joined as text": _joined_text_keys,
    "times compared as text of the session": _times_as_session_text,
    "milliseconds": _milliseconds,
    "filled column by column": _filled_column_by_column,
    "unmatched rows dropped": _unmatched_dropped,
    "spine deduplicated": _spine_deduplicated,
    "null keys match": _null_keys_match,
    "ties multiply rows": _ties_multiply,
}
CASES = 300


def test_the_right_join_passes(spark: SparkSession) -> None:
    """Nothing is held against the join as it is, so what follows is due to the planted bugs alone."""
    assert random_failures(spark, asof_join, SEED, CASES) == []


@pytest.mark.parametrize("bug", WRONG_PARTS)
def test_a_wrong_part_is_caught(spark: SparkSession, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Each wrong part makes the checker find a difference."""
    for name, part in WRONG_PARTS[bug].items():
        monkeypatch.setattr(asof, name, part)
    assert random_failures(spark, asof_join, SEED, CASES)


@pytest.mark.parametrize("bug", WRONG_JOINS)
def test_a_wrong_join_is_caught(spark: SparkSession, bug: str) -> None:
    """Each wrong join makes the checker find a difference."""
    assert random_failures(spark, WRONG_JOINS[bug], SEED, CASES)
