"""Random cases: the as-of join gives what the naive oracle gives."""

from __future__ import annotations

import os

import pytest
from pyspark.sql import SparkSession

from spark_fs.offline.asof import asof_join
from tests.asof_contract import SEED, ZONES, random_cases, random_failures
from tests.oracle import naive_asof


@pytest.mark.parametrize("session_zone", ZONES, indirect=True)
def test_random_cases_agree_with_the_oracle(spark: SparkSession, session_zone: str) -> None:
    """400 cases under eight rules: ties, nulls, microsecond steps, clock changes, ttl edges, composite keys, known_at.

    Set SPARK_FS_SEED to look elsewhere; a failure names its seed.
    """
    seed = int(os.environ.get("SPARK_FS_SEED", SEED)) + ZONES.index(session_zone)
    assert random_failures(spark, asof_join, seed, 400)[:3] == []


def test_random_cases_meet_the_hard_spots() -> None:
    """The generator makes what it promises: equal times, ties in event and created time, nulls, exact duplicates."""
    spine, rows = random_cases(SEED, 400)
    spots = {(row["case"], row["a"], row["event_timestamp"]) for row in rows}
    assert sum((row["case"], row["a"], row["event_timestamp"]) in spots for row in spine) > 50
    times = [(row["case"], row["a"], row["b"], row["event_timestamp"], row["created_timestamp"]) for row in rows]
    assert len(times) - len(set(times)) > 100
    for rows_of_side, columns in ((spine, ("a", "b", "event_timestamp")), (rows, ("a", "created_timestamp", "value"))):
        assert all(any(row[column] is None for row in rows_of_side) for column in columns)
    assert len({row["rid"] for row in rows}) < len(rows)


def test_the_oracle_itself() -> None:
    """The oracle answers a case small enough to be checked by eye."""
    rows = [
        {"id": 1, "event_timestamp": 10, "created_timestamp": None, "hash": 9},
        {"id": 1, "event_timestamp": 10, "created_timestamp": 50, "hash": 1},
        {"id": 1, "event_timestamp": 20, "created_timestamp": 20, "hash": 0},
        {"id": None, "event_timestamp": 10, "created_timestamp": 10, "hash": 0},
    ]
    spine = [{"id": 1, "event_timestamp": t} for t in (9, 10, 20, 31)] + [{"id": None, "event_timestamp": 20}]

    def winners(**rule: object) -> list[int | None]:
        found = naive_asof(spine, rows, ["id"], **rule)  # type: ignore[arg-type]
        return [None if row is None else rows.index(dict(row)) for row in found]

    assert winners() == [None, 1, 2, 2, None]
    assert winners(ttl_micros=10) == [None, 1, 2, None, None]
    assert winners(known_at=True) == [None, None, 2, 2, None]
