"""The write budget of a run: all its tasks together keep to it, whatever kind of run it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from spark_fs.errors import InvalidError
from spark_fs.materialize import MaterializeResult
from spark_fs.online import server
from tests.project import open_project, write

END = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
USERS = 6_000
SPEND = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = FileSource("payments", path="data/payments", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("amount", Int64)], payments)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a project whose embedded server is stopped afterwards."""
    yield tmp_path
    server.stop(tmp_path / ".spark_fs")


def opened(folder: Path, spark: SparkSession, settings: str = "") -> FeatureStore:
    """An applied project of 8 buckets with a row for each user, built."""
    store = open_project(folder, SPEND, spark, settings=f"offline:\n  buckets: 8\n{settings}")
    store.apply()
    put(folder, END - timedelta(days=2))
    store.build(end=END - timedelta(days=1))
    return store


def put(folder: Path, at: datetime, users: int = USERS) -> None:
    """Make a row at this time for each of so many users all that the source holds."""
    write(folder / "data" / "payments" / "_SUCCESS", "")
    columns = {"user_id": range(users), "at": pa.array([at] * users, pa.timestamp("us", tz="UTC")), "amount": range(users)}
    pq.write_table(
        pa.table({name: pa.array(values) for name, values in columns.items()}), folder / "data/payments/part.parquet"
    )


def timed(run: Callable[[], list[MaterializeResult]]) -> tuple[float, MaterializeResult]:
    """What a run did, and the seconds from the first row that could be sent to the end: a run takes longer in all."""
    began = time.monotonic()
    (result,) = run()
    return time.monotonic() - began, result


def test_all_tasks_together_keep_to_the_budget(folder: Path, spark: SparkSession) -> None:
    """A first run, one that compares, a repair, and one with changes: none writes more than the budget in a second."""
    store, budget = opened(folder, spark), 2_000
    start, end, how = END - timedelta(days=30), END, {"max_rows_per_second": budget}
    least = 0.9 * USERS / budget  # a tenth of a second's rows of each task are let through at once
    seconds, first = timed(lambda: store.materialize(start, END - timedelta(days=1), **how))
    assert (first.applied, seconds > least) == (USERS, True)
    seconds, again = timed(lambda: store.materialize(start, END - timedelta(days=1), everything=True, **how))
    assert (again.equal, seconds > least) == (USERS, True)
    seconds, repaired = timed(lambda: store.repair(**how))
    assert (repaired.equal, seconds > least) == (USERS, True)
    put(folder, END - timedelta(hours=2), USERS // 2)
    seconds, new = timed(lambda: store.materialize_incremental(end, **how))
    assert (new.applied, seconds > least / 2) == (USERS // 2, True)
    with redis.Redis.from_url(store.online_url()) as client:
        assert client.info("commandstats")["cmdstat_msetnx"]["calls"] >= USERS / 100  # type: ignore[index]


def test_the_setting_is_the_budget_of_all_runs_and_may_be_lifted(folder: Path, spark: SparkSession) -> None:
    """``online.max_rows_per_second`` holds where a run names none; 0 is no limit."""
    store = opened(folder, spark, "online:\n  max_rows_per_second: 1000\n")
    start, end = END - timedelta(days=30), END - timedelta(days=1)
    seconds, first = timed(lambda: store.materialize(start, end))
    assert (first.applied, seconds > 0.9 * USERS / 1_000) == (USERS, True)
    quick, again = timed(lambda: store.materialize(start, end, everything=True, max_rows_per_second=0))
    assert (again.equal, quick < seconds) == (USERS, True)


def test_a_negative_budget_is_refused(folder: Path, spark: SparkSession) -> None:
    """Nothing is published then."""
    store = opened(folder, spark)
    arguments: dict[str, Any] = {"max_rows_per_second": -5}
    with pytest.raises(InvalidError) as caught:
        store.materialize(END - timedelta(days=30), END - timedelta(days=1), **arguments)
    assert caught.value.problems[0].code == "SFS-629"
