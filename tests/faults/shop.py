"""A shop whose payments are published by a cluster over a slow link: one project, its data, and what should be online."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import redis
from pyspark.sql import SparkSession

from spark_fs import FeatureStore
from spark_fs.errors import ConflictError
from spark_fs.files import feature_table_path
from spark_fs.intervals import Interval
from spark_fs.materialize import MaterializeResult, materialize_view
from spark_fs.offline.tables import FeatureTable
from spark_fs.online import codec
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Published
from tests.e2e.command import PATIENCE_SECONDS, processes, until, with_jars
from tests.e2e.command import start as start_command
from tests.faults.cluster import Cluster, Frozen, Writer, is_gone
from tests.online.proxy import Proxy, proxy_to
from tests.online.servers import free_port, redis_process
from tests.project import open_project

#: All payments lie in [START, END): the older one of each user before MIDDLE, the newer one after it.
END = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
MIDDLE, START = END - timedelta(days=10), END - timedelta(days=20)
USERS = 40_000
#: Each has one file, and each file is a task: that takes some megabytes.
BUCKETS = 8
RECEIPT_BYTES = 400
#: Of each connection, in bytes a second: so slow that a run takes many seconds, and nothing times out.
SLOW = 500_000.0

#: (user, time) → amount
Payments = dict[tuple[int, datetime], int]

DEFINITIONS = """
    user = Entity("user", [Field("user_id", Int64)])
    payments = FileSource("payments", path="data", timestamp_field="at")
    spend = FeatureView("spend", user, [Field("amount", Int64), Field("receipt", Bytes)], payments)
"""
SETTINGS = """
offline:
  buckets: {buckets}
online:
  url: {url}
  timeout_seconds: 15
spark:
  master: {master}
  conf:
    spark.driver.host: 127.0.0.1
    spark.driver.bindAddress: 127.0.0.1
    spark.driver.memory: 1g
    spark.driver.extraJavaOptions: -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
    spark.executor.extraJavaOptions: -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
    spark.executor.memory: 700m
    spark.executor.cores: 1
    spark.cores.max: 2
    spark.ui.enabled: false
    spark.sql.shuffle.partitions: 2
    spark.databricks.delta.snapshotPartitions: 1
"""


def first_payments() -> Payments:
    """Two payments of each user, at many times."""
    hours = 240
    old = {(user, START + timedelta(hours=user % hours)): user for user in range(USERS)}
    return old | {(user, MIDDLE + timedelta(hours=user * 7 % hours)): USERS + user for user in range(USERS)}


def receipt(amount: int) -> bytes:
    """What belongs to an amount, and to no other; it cannot be compressed."""
    return hashlib.shake_128(b"%d" % amount).digest(RECEIPT_BYTES)


def put(folder: Path, payments: Payments) -> None:
    """Make the payments all that the source holds."""
    (folder / "data").mkdir(exist_ok=True)
    users, times = zip(*payments, strict=True)
    columns = {
        "user_id": pa.array(users, pa.int64()),
        "at": pa.array(times, pa.timestamp("us", tz="UTC")),
        "amount": pa.array(payments.values(), pa.int64()),
        "receipt": pa.array(map(receipt, payments.values()), pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / "data" / "part.parquet")


def changed_payments() -> Payments:
    """Of four users in turn: a newer payment, a corrected amount, the newest payment gone, none or all of them gone."""
    payments = first_payments()
    for user, at in list(payments):
        if user % 4 == 0:
            payments[user, END - timedelta(minutes=1)] = 3 * USERS + user
        elif at >= MIDDLE and user % 4 == 1:
            payments[user, at] += USERS
        elif (at >= MIDDLE and user % 4 == 2) or user % 8 == 3:
            del payments[user, at]
    return payments


def newest(payments: Payments, start: datetime = START, end: datetime = END) -> dict[int, int]:
    """What should be online of an interval: the amount of the newest payment of each user."""
    found: dict[int, tuple[datetime, int]] = {}
    for (user, at), amount in payments.items():
        if start <= at < end and (user not in found or at > found[user][0]):
            found[user] = (at, amount)
    return {user: amount for user, (_, amount) in found.items()}


def built_template(folder: Path, cluster: Cluster) -> FeatureStore:
    """The shop with its first payments in the feature table and nothing published; starts a driver in this process."""
    settings = SETTINGS.format(buckets=BUCKETS, url="embedded", master=cluster.url)
    fs = open_project(with_jars(folder), DEFINITIONS, settings=settings)
    fs.apply()
    put(folder, first_payments())
    fs.build(end=END)
    return fs


class Shop:
    """A shop of the test's own, and a Redis of its own behind a proxy.

    ``fs`` runs on the cluster by the driver that all tests share; ``start`` and ``begin`` publish by other drivers, beside it.
    ``payments`` is what the source holds.
    """

    def __init__(self, folder: Path, cluster: Cluster, spark: SparkSession, proxy: Proxy, port: int, stack: ExitStack) -> None:
        self.folder, self.cluster, self.proxy = folder, cluster, proxy
        self.payments = first_payments()
        self._port, self._stack, self._spark = port, stack, spark
        self._server = ExitStack()
        self.client = stack.enter_context(redis.Redis(port=port))
        self._pool = stack.enter_context(ThreadPoolExecutor(2))
        stack.callback(self._server.close)
        self.start_server()
        self.fs = self.configured({})

    # ---- the project

    def configured(self, conf: Mapping[str, str]) -> FeatureStore:
        """The store opened with more settings for Spark; they count for the drivers that ``start`` starts."""
        settings = SETTINGS.format(buckets=BUCKETS, url=self.proxy.url, master=self.cluster.url)
        more = "".join(f"    {name}: {value}\n" for name, value in conf.items())
        return open_project(self.folder, DEFINITIONS, self._spark, settings=settings + more)

    def rebuild(self, payments: Payments) -> None:
        """Make these payments all there are, and all of the feature table."""
        self.payments = payments
        put(self.folder, payments)
        self.fs.build(start=START, end=END)

    def published(self) -> Published | None:
        """What the registry says is online."""
        return self.fs.registry.published(self.fs.registry.state().require_view("spend"))

    # ---- runs

    def start(self, start: datetime = START, end: datetime = END) -> subprocess.Popen[str]:
        """Publish ``[start, end)`` by ``spark-fs materialize`` in a session of its own, meanwhile."""
        arguments = ("materialize", start.isoformat(), end.isoformat(), "--output", "json")
        with open(self.folder / "stderr", "w") as log:
            process = start_command(self.folder, "--env", "test", *arguments, err=log)
        self._stack.callback(_end, process)
        return process

    def start_and_await(self) -> subprocess.Popen[str]:
        """Publish all by ``spark-fs``, slowly; it is in the middle of its writing."""
        self.slow()
        command = self.start()
        self.await_rows()
        return command

    def told(self) -> str:
        """What the command that was started last has said on stderr."""
        return (self.folder / "stderr").read_text()

    def assert_nothing_is_left(self, command: subprocess.Popen[str]) -> None:
        """No process of the command, and none that writes for it."""
        until(lambda: is_gone(command.pid))
        until(lambda: not self.writers())

    def begin(self, start: datetime = START, end: datetime = END) -> Future[list[MaterializeResult]]:
        """Publish ``[start, end)`` by the shared driver, meanwhile."""
        return self._pool.submit(self.fs.materialize, start, end)

    def begin_beside(self, start: datetime, end: datetime) -> Future[MaterializeResult]:
        """As ``begin``, by a run that asks nobody whether another one is at the view: both write at the same time."""
        view = self.fs.registry.state().require_view("spend")
        table = FeatureTable(self._spark, feature_table_path(self.fs.environment.offline_root, view), view)
        target = OnlineTarget.of(self.proxy.url, view)
        return self._pool.submit(materialize_view, self.fs.registry, table, target, Interval(start, end))

    def again(self) -> MaterializeResult:
        """Publish all by the shared driver; where others hold the view, as soon as they have ended or are given up."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                (result,) = self.fs.materialize(START, END)
            except ConflictError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            else:
                return result

    def settle(self) -> MaterializeResult:
        """The same command once more completes all, and a third time finds nothing to do; gives the result of the first."""
        completed = self.again()
        assert self.online() == newest(self.payments)
        idle = self.again()
        assert (idle.rows_read, idle.applied, idle.withdrawn, idle.bytes) == (0, 0, 0, 0)
        assert self.online() == newest(self.payments)
        return completed

    # ---- the online store

    def start_server(self) -> None:
        """Start an empty server."""
        self._server.enter_context(redis_process(self.folder, port=self._port))

    def kill_server(self) -> None:
        """Kill the server; what it held is gone."""
        self._server.close()

    def online(self) -> dict[int, int]:
        """All that is online, from the server's own memory: user → amount. Each row has the receipt of its amount."""
        view = self.fs.registry.state().require_view("spend")
        decode = codec.Decoder(view.features).decode
        names = list(self.client.scan_iter(codec.key_prefix(view) + b"{*", count=10_000))
        found = {}
        for start in range(0, len(names), 10_000):
            some = names[start : start + 10_000]
            values: Any = self.client.mget(some)
            for name, value in zip(some, values, strict=True):
                if len(value) > codec.HEADER.size:
                    amount, paper = decode(value)
                    assert paper == receipt(amount)
                    found[int(name.rpartition(b":")[2])] = amount
        return found

    def calls(self) -> int:
        """How many calls with rows the server has answered since it was started, whatever became of the rows."""
        stats: Any = self.client.info("commandstats")
        return sum(
            stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("mget", "msetnx", "evalsha", "eval", "fcall")
        )

    def slow(self, times: int = 1) -> None:
        """Let all that is written from now on take its time, or so many times as much."""
        self.proxy.bytes_per_second = SLOW / times

    def fast(self) -> None:
        """Let all pass as it comes."""
        self.proxy.bytes_per_second = float("inf")

    def written(self) -> int:
        """How many rows the server has written since it was started; those that changed nothing do not count."""
        stats: Any = self.client.info("persistence")
        return int(stats["rdb_changes_since_last_save"])

    def await_rows(self, more: int = USERS // 10) -> None:
        """Return once so many more rows are written: a slow run is in its middle then, with tasks under way and to come."""
        enough = self.written() + more
        until(lambda: self.written() >= enough)

    def writers(self) -> set[Writer]:
        """The Python workers that write rows now."""
        port = urlsplit(self.proxy.url).port
        assert port is not None
        return self.cluster.writers(port)

    def a_writer(self) -> Writer:
        """A Python worker in the middle of a task: it has written some of its rows, and holds the others."""
        lasting: set[Writer] = set()
        while not lasting:
            before = self.writers()
            self.await_rows(USERS // BUCKETS // 2)  # there are two writers at a time: a quarter of a task of each
            lasting = before & self.writers()
        return min(lasting, key=lambda writer: writer.pid)

    def freeze(self) -> Frozen:
        """Freeze a Python worker in the middle of a task and cut it off: what it sent and nobody has seen, it sends late."""
        frozen = Frozen(self.a_writer())
        self.proxy.cut()  # other workers connect again
        return frozen


@contextmanager
def open_shop(folder: Path, template: FeatureStore, cluster: Cluster) -> Iterator[Shop]:
    """A copy of the template with a server of its own, for the block; runs that are still under way are waited for."""
    shutil.copytree(template.environment.root, folder, symlinks=True, dirs_exist_ok=True)
    port = free_port()
    with ExitStack() as stack:
        proxy = stack.enter_context(proxy_to(f"redis://127.0.0.1:{port}/0"))
        shop = Shop(folder, cluster, template.spark, proxy, port, stack)
        stack.callback(shop.fast)
        yield shop


def kill_driver(command: subprocess.Popen[str]) -> None:
    """Kill -9 of all that runs for a command on this side of the cluster, and the end of the command."""
    for process in processes():
        if process.session == command.pid and process.pid != command.pid:
            with suppress(ProcessLookupError):  # it has ended with another one
                os.kill(process.pid, signal.SIGKILL)
    command.communicate(timeout=PATIENCE_SECONDS)
    until(lambda: is_gone(command.pid))


def _end(command: subprocess.Popen[str]) -> None:
    """Kill what is left of a command that was started: only where a test has failed is there anything."""
    if command.poll() is None:
        kill_driver(command)
