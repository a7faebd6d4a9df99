"""A run that the online store has no room for is refused with its figures, before a row of it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from spark_fs.errors import InvalidError
from spark_fs.files import feature_table_path
from spark_fs.intervals import Interval
from spark_fs.materialize import materialize_view
from spark_fs.offline.tables import FeatureTable
from spark_fs.online.redis_store import OnlineTarget
from tests.online.servers import redis_process
from tests.project import open_project
from tests.spark.test_materialize import DAY, END, SPEND, START, put


@pytest.fixture
def client(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Redis of the test's own."""
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as plain:
        yield plain


@pytest.fixture
def fs(tmp_path: Path, client: redis.Redis, spark: SparkSession) -> FeatureStore:
    """An applied project that publishes to that Redis."""
    return opened(tmp_path, client, spark)


def opened(folder: Path, client: redis.Redis, spark: SparkSession, definitions: str = SPEND) -> FeatureStore:
    port = client.connection_pool.connection_kwargs["port"]
    store = open_project(folder, definitions, spark, settings=f"online:\n  url: redis://127.0.0.1:{port}/0\n")
    store.apply()
    return store


def leave(client: redis.Redis, free: int) -> None:
    """Let the server have room for so many bytes more."""
    used: Any = client.info("memory")
    client.config_set("maxmemory", int(used["used_memory"]) + free)


@contextmanager
def jobs_of(spark: SparkSession, name: str) -> Iterator[list[int]]:
    """The Spark jobs of the block, filled in at its end."""
    found: list[int] = []
    spark.sparkContext.setJobGroup(name, name)
    try:
        yield found
    finally:
        found += spark.sparkContext.statusTracker().getJobIdsForGroup(name)
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", "")


def test_what_does_not_fit_is_refused_before_a_row_is_written(fs: FeatureStore, tmp_path: Path, client: redis.Redis) -> None:
    """With keys, bytes of each, bytes of all and what is free; nothing is noted, and with more memory the same run ends."""
    put(tmp_path, [(user, START, user) for user in range(20_000)])
    leave(client, 1_000_000)
    with pytest.raises(InvalidError, match="SFS-621") as caught:
        fs.materialize_incremental(END)
    told = re.search(r"about ([\d,]+) new keys of ([\d,]+) bytes take ([\d,]+) bytes; ([\d,]+) are free", str(caught.value))
    assert told is not None
    keys, each, needed, free = (int(figure.replace(",", "")) for figure in told.groups())
    assert 19_000 <= keys <= 20_000
    assert 100 < each < 250
    assert needed == keys * each
    assert 800_000 < free <= 1_000_000
    assert client.dbsize() == 0
    assert fs.registry.published(fs.registry.state().require_view("spend")) is None
    leave(client, 5_000_000)
    assert fs.materialize_incremental(END)[0].applied == 20_000


def test_after_a_refusal_a_shorter_interval_can_be_published(fs: FeatureStore, tmp_path: Path, client: redis.Redis) -> None:
    """A refused run is not taken up by the next one: what it asked for would be refused for ever."""
    middle = START + DAY
    put(tmp_path, [(user, START if user < 1_000 else middle, user) for user in range(20_000)])
    leave(client, 1_000_000)
    with pytest.raises(InvalidError, match="SFS-621"):
        fs.materialize_incremental(END)
    assert fs.registry.ledger.unfinished(fs.registry.state().require_view("spend")) == []
    assert fs.materialize(START, middle)[0].applied == 1_000
    with pytest.raises(InvalidError, match="SFS-621"):
        fs.materialize_incremental(END)


def test_the_estimate_is_what_the_server_takes(fs: FeatureStore, tmp_path: Path, client: redis.Redis) -> None:
    """Where the run is told to take a little less than is free, it ends; the server is not full then."""
    put(tmp_path, [(user, START, user) for user in range(20_000)])
    leave(client, 20_000 * 100)
    with pytest.raises(InvalidError, match="SFS-621") as caught:
        fs.materialize_incremental(END)
    needed = int(re.search(r"take ([\d,]+) bytes", str(caught.value)).group(1).replace(",", ""))  # type: ignore[union-attr]
    leave(client, needed * 115 // 100)
    assert fs.materialize_incremental(END)[0].applied == 20_000


def test_many_rows_of_few_keys_are_counted_by_key(fs: FeatureStore, tmp_path: Path, client: redis.Redis) -> None:
    """All rows would not fit as keys; the keys do."""
    put(tmp_path, [(n % 50, START + n * timedelta(seconds=1), n) for n in range(20_000)])
    leave(client, 1_000_000)
    assert fs.materialize_incremental(END)[0].applied == 50


def test_keys_that_are_online_take_no_more_room(fs: FeatureStore, tmp_path: Path, client: redis.Redis) -> None:
    """Newer rows go in their place: a run over the same keys needs nothing, half of them being new is refused."""
    middle = START + DAY
    put(tmp_path, [(user, START, user) for user in range(10_000)] + [(user, middle, user) for user in range(10_000)])
    fs.materialize(START, middle)
    assert client.dbsize() == 10_001
    leave(client, 700_000)
    assert fs.materialize(middle, END)[0].applied == 10_000
    put(tmp_path, [(user, middle + DAY, user) for user in range(20_000)])
    fs.registry.forget_builds(fs.registry.state().require_view("spend"))  # so that all is fresh again
    with pytest.raises(InvalidError, match=r"SFS-621.* about (9,|10,)\d{3} new keys"):
        fs.materialize(START, END)


def test_rows_past_their_ttl_need_no_room(tmp_path: Path, client: redis.Redis, spark: SparkSession) -> None:
    """They are not kept."""
    fs = opened(tmp_path, client, spark, SPEND.replace("payments)", "payments, ttl=timedelta(days=2))"))
    put(tmp_path, [(user, START, user) for user in range(20_000)])
    leave(client, 1_000_000)
    assert fs.materialize_incremental(END)[0].expired == 20_000


def test_a_run_with_room_enough_asks_spark_nothing_more(
    fs: FeatureStore, tmp_path: Path, client: redis.Redis, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's log and one data file tell: there are as many jobs as without the check."""
    put(tmp_path, [(user, START, user) for user in range(1_000)])
    fs.build(end=END)
    leave(client, 50_000_000)
    with jobs_of(spark, f"checked {tmp_path}") as checked:
        fs.materialize(START, END)
    client.flushall()
    fs.registry.forget_builds(fs.registry.state().require_view("spend"))
    fs.build(end=END)
    monkeypatch.setattr("spark_fs.materialize.check_room", lambda *_: None)
    with jobs_of(spark, f"unchecked {tmp_path}") as unchecked:
        fs.materialize(START, END)
    assert len(checked) == len(unchecked)


def test_a_table_that_only_spark_can_open_is_checked_too(
    fs: FeatureStore, tmp_path: Path, client: redis.Redis, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are then counted and sampled by Spark."""
    put(tmp_path, [(user, START, user) for user in range(20_000)])
    fs.build(end=END)
    monkeypatch.setattr("spark_fs.room.read_layout", lambda *_: (None, None, "of a kind that Arrow does not know"))
    leave(client, 1_000_000)
    with pytest.raises(InvalidError, match="SFS-621"):
        fs.materialize_incremental(END)
    assert client.dbsize() == 0
    leave(client, 6_000_000)
    assert fs.materialize_incremental(END)[0].applied == 20_000
    view = fs.registry.state().require_view("spend")
    table = FeatureTable(spark, feature_table_path(fs.environment.offline_root, view), view)
    empty = Interval(END, END + DAY)
    assert materialize_view(fs.registry, table, OnlineTarget.of(fs.online_url(), view), empty).rows_read == 0
