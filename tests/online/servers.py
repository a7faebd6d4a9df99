"""Real servers for tests: started on a free port, stopped by process id. And rows to write to them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis

from spark_fs.online.redis_store import OnlineTarget
from spark_fs.spec import Column, SourceSpec, ViewSpec
from spark_fs.types import Int64, String

UTC = timezone.utc
NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)
FEATURES = (Column("n", Int64), Column("s", String))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_binary() -> str:
    """Debian's redis-server; in CI it must be there, elsewhere the tests that need it are skipped."""
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is not installed (apt-get install redis-server)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return str(found)


@contextmanager
def redis_process(folder: Path, *options: str, password: str = "", port: int = 0) -> Iterator[str]:
    """A redis-server of its own for the block, on a free port if none is given; gives its URL."""
    port = port or free_port()
    argv = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", *options]
    process = subprocess.Popen([*argv, *(["--requirepass", password] if password else [])], stdout=subprocess.DEVNULL)
    url = f"redis://:{password}@127.0.0.1:{port}/0" if password else f"redis://127.0.0.1:{port}/0"
    try:
        await_answer(url)
        yield url
    finally:
        process.kill()
        process.wait()


def await_answer(url: str, seconds: float = 20.0) -> None:
    """Return once the server answers."""
    deadline = time.monotonic() + seconds
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return


def ping_for_ever(url: str) -> None:
    """Return by the error of a ping only."""
    with redis.Redis.from_url(url) as client:
        while True:
            client.ping()


def view_of(
    name: str = "weather",
    *,
    keys: Sequence[Column] = (Column("origin", String),),
    features: Sequence[Column] = FEATURES,
    ttl: timedelta | None = None,
) -> ViewSpec:
    source = SourceSpec("s", "delta", "ts", path="somewhere")
    return ViewSpec("flights", name, 1, ("airport",), tuple(keys), tuple(features), source, ttl)


def target_of(url: str, view: ViewSpec | None = None, wait_replicas: int = 0, **more: Any) -> OnlineTarget:
    return replace(OnlineTarget.of(url, view or view_of(), **more), wait_replicas=wait_replicas)


def batch(
    keys: Sequence[bytes],
    events: Sequence[datetime] | datetime = NOON,
    *,
    created: Sequence[datetime | None] | datetime | None = None,
    builds: Sequence[int] | int = 1,
    features: Sequence[Column] = FEATURES,
    **values: Sequence[Any],
) -> pa.RecordBatch:
    """Rows to write; a single time or build stands for all rows, features not given are null."""
    count, instant = len(keys), pa.timestamp("us", tz="UTC")

    def spread(value: Any) -> list[Any]:
        return list(value) if isinstance(value, (list, tuple)) else [value] * count

    columns = {
        "_key": pa.array(keys, pa.binary()),
        "event_timestamp": pa.array(spread(events), instant),
        "created_timestamp": pa.array(spread(created), instant),
        "_build": pa.array(spread(builds), pa.int64()),
    }
    for feature in features:
        columns[feature.name] = pa.array(values.get(feature.name, [None] * count), feature.type.arrow())
    return pa.RecordBatch.from_pydict(columns)
