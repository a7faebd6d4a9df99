"""How fast values go from a feature table through Spark into Redis, beside what any client could do.

    python -m benchmarks.bench_materialize [--keys N] [--runs N] [--runs …]

A feature table of N keys × 5 doubles is materialized end to end (plan, read, newest row per key, encode, guarded write,
counts), warm. In the same run, in turns, on the same server: redis-py's pipelined HSET of the same values (on a tenth of
the keys, in rows per second) and redis-benchmark's pipelined SET (-P 500) of values of the same size. Needs redis-server.
Prints one JSON line per figure; exits 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import redis
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from benchmarks.report import Report, spark_session
from spark_fs.intervals import BEGINNING, Interval
from spark_fs.materialize import MaterializeResult, materialize_view
from spark_fs.offline.tables import FeatureTable
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Registry
from spark_fs.spec import Column, SourceSpec, ViewSpec
from spark_fs.types import Float64, Int64

DOUBLES = 5
BUCKETS = 8
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
VIEW = ViewSpec(
    project="bench",
    name="values",
    version=1,
    entities=("key",),
    keys=(Column("key_id", Int64),),
    features=tuple(Column(f"f{n}", Float64) for n in range(DOUBLES)),
    source=SourceSpec("generated", "spark", "event_timestamp"),
)


def main() -> int:
    """Write the table, run the three writers in turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as url:
        spark = spark_session(Path(folder), "bench_materialize")
        table = _table(spark, f"{folder}/values", arguments.keys)
        names = ("spark_fs", "equal", "unchanged", "redis_py", "redis_benchmark")
        rates: dict[str, list[float]] = {name: [] for name in names}
        for run in range(arguments.runs + 1):  # run 0 warms the JVM and the workers and is not counted
            registry = Registry(f"sqlite:///{folder}/registry-{run}.db", "bench")
            measured = _round(registry, table, url, arguments.keys)
            print(f"run {run}: { ({name: round(rate) for name, rate in measured.items()}) }", file=sys.stderr)
            for name, rate in measured.items():
                rates[name] += [rate] if run else []
        spark.stop()
    for name, values in rates.items():
        report.figure(f"{name}_rows_per_second", statistics.median(values), "rows/s", spread=(min(values), max(values)))
    for name, least in (("redis_py", 3.0), ("redis_benchmark", 0.4)):
        ratios = [ours / theirs for ours, theirs in zip(rates["spark_fs"], rates[name], strict=True)]
        spread = (min(ratios), max(ratios))
        report.figure(f"materialize_vs_{name}", statistics.median(ratios), "x", spread=spread, at_least=least)
    return report.exit_code


def _round(registry: Registry, table: FeatureTable, url: str, keys: int) -> dict[str, float]:
    client = redis.Redis.from_url(url)
    target = OnlineTarget.of(url, VIEW)
    whole = Interval(BEGINNING, NOW)
    client.flushall()

    def publish(*, everything: bool = False) -> tuple[float, MaterializeResult]:
        began = time.perf_counter()
        result = materialize_view(registry, table, target, whole, everything=everything)
        return time.perf_counter() - began, result

    first, again, unchanged = publish(), publish(everything=True), publish()
    assert first[1].applied == again[1].equal == keys
    assert unchanged[1].rows_read == 0
    value_bytes = client.strlen(next(client.scan_iter(count=10)))
    client.flushall()
    rates = {"spark_fs": keys / first[0], "equal": keys / again[0], "unchanged": keys / unchanged[0]}
    rates["redis_py"] = _hset_rate(client, keys // 10)
    client.flushall()
    rates["redis_benchmark"] = _set_rate(url, keys, value_bytes)
    client.flushall()
    return rates


def _hset_rate(client: redis.Redis, keys: int) -> float:
    """Rows per second of pipelined HSETs of 500 rows, one field per feature, as a plain client writes them."""
    values = {f"f{n}": 0.123456789 * (n + 1) for n in range(DOUBLES)}
    began = time.perf_counter()
    for start in range(0, keys, 500):
        pipeline = client.pipeline(transaction=False)
        for key in range(start, min(start + 500, keys)):
            pipeline.hset(f"bench:values:{key}", mapping={name: value + key for name, value in values.items()})
        pipeline.execute()
    return keys / (time.perf_counter() - began)


def _set_rate(url: str, keys: int, value_bytes: int) -> float:
    port = url.rsplit(":", 1)[1].split("/")[0]
    argv = ["redis-benchmark", "-p", port, "-t", "set", "-n", str(keys), "-r", str(keys), "-P", "500", "-d", str(value_bytes)]
    out = subprocess.run([*argv, "--csv"], capture_output=True, text=True, check=True).stdout
    return float(out.splitlines()[-1].split(",")[1].strip('"'))


def _table(spark: SparkSession, path: str, keys: int) -> FeatureTable:
    """A feature table of one row per key, laid out as a build lays it out."""
    table = FeatureTable(spark, path, VIEW)
    table.create(BUCKETS)
    micros = F.lit(1_700_000_000_000_000) + F.col("id")
    rows = spark.range(keys).select(
        F.col("id").alias("key_id"),
        F.timestamp_micros(micros).alias("event_timestamp"),
        F.timestamp_micros(micros).alias("created_timestamp"),
        *(F.rand(n).alias(f"f{n}") for n in range(DOUBLES)),
    )
    table.replace(rows, Interval(BEGINNING, NOW), 1)
    return table


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None or shutil.which("redis-benchmark") is None:
        sys.exit("redis-server and redis-benchmark are needed: apt-get install redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL) as process:
        url = f"redis://127.0.0.1:{port}/0"
        client = redis.Redis.from_url(url)
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        try:
            yield url
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
