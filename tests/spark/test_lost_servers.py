"""Runs during which servers of the online store are lost: what is noted as published is there."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from pyspark.sql import SparkSession

from spark_fs import materialize
from spark_fs.errors import SparkFSError
from tests.online.servers import free_port, redis_process
from tests.online.topologies import Node, Sentinels, cluster, sentinels
from tests.spark.test_materialize import END, START, against, counts, online, put

USERS = 200_000


def test_a_server_that_loses_rows_during_a_run_makes_it_begin_anew(
    tmp_path: Path, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back without its data before the mark is left: the mark would be there, and the rows not."""
    port = free_port()
    fs = against(tmp_path, spark, f"redis://127.0.0.1:{port}/0")
    put(tmp_path, [(user, START, user) for user in range(100)])
    with ExitStack() as running:
        running.enter_context(redis_process(tmp_path, port=port))
        leave, marks = materialize.leave_token, 0

        def lose_all_and_leave(*args: Any, **options: Any) -> None:
            nonlocal marks
            marks += 1
            if marks == 2:  # the first one is left before rows are written
                running.close()
                running.enter_context(redis_process(tmp_path, port=port))
            leave(*args, **options)

        monkeypatch.setattr(materialize, "leave_token", lose_all_and_leave)
        assert counts(fs.materialize_incremental(END)) == (200, 200, 0, 0, 0)
        assert marks == 4
        assert online(fs, [0, 99]) == [0, 99]
        assert fs.audit()[0].ok
        assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)


def test_an_erasure_that_a_server_loses_is_noticed_and_made_again(tmp_path: Path, spark: SparkSession) -> None:
    """Back with the data of before, as after a failover that loses it: the next run says so, and a repair removes it."""
    port = free_port()
    fs = against(tmp_path, spark, f"redis://127.0.0.1:{port}/0")
    put(tmp_path, [(user, START, user) for user in range(3)])
    with redis_process(tmp_path, port=port) as url, redis.Redis.from_url(url) as client:
        fs.materialize_incremental(END)
        client.save()
        assert fs.erase("spend", {"user_id": [1]})["online_keys"] == 1
        assert online(fs, [0, 1]) == [0, "NOT_FOUND"]
        assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)
    with redis_process(tmp_path, port=port):
        assert online(fs, [0, 1]) == [0, 1]
        with pytest.raises(SparkFSError, match="SFS-616"):
            fs.materialize_incremental(END)
        assert fs.audit()[0].extra == 1
        assert fs.repair()[0].withdrawn == 1
        assert online(fs, [0, 1]) == [0, "NOT_FOUND"]
        assert fs.audit()[0].ok
        assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("topology", [sentinels, cluster])
def test_a_run_outlives_a_master(tmp_path: Path, spark: SparkSession, topology: Any) -> None:
    """Killed while executors write: the run ends well, all rows are there, and another one has nothing to do."""
    with topology(tmp_path) as setup:
        fs = against(tmp_path / "project", spark, setup.url)
        put(tmp_path / "project", [(user, START, user) for user in range(USERS)])
        fs.build(start=START, end=END)
        victim = setup.master if isinstance(setup, Sentinels) else setup.masters[1]
        killing = threading.Thread(target=kill_once_written, args=(victim, found := []))
        killing.start()
        (result,) = fs.materialize_incremental(END)
        killing.join()
        assert 0 < found[0] < USERS
        # The run began anew, for confirmed rows may be lost with a master.
        assert result.applied + result.equal >= 2 * USERS
        assert online(fs, [0, USERS // 2, USERS - 1]) == [0, USERS // 2, USERS - 1]
        assert fs.audit()[0].ok
        assert counts(fs.materialize_incremental(END)) == (0, 0, 0, 0, 0)


def kill_once_written(victim: Node, found: list[int]) -> None:
    # More than the sample by which the run has asked for room.
    while (rows := victim.client.dbsize()) < 5_000:  # type: ignore[operator]
        time.sleep(0.001)
    victim.kill()
    found.append(rows)  # type: ignore[arg-type]
