"""How fast values go from feature tables into Redis and out again, beside what any client could do: ``make bench-online``.

    python -m benchmarks.bench_online [--only first,replay,…] [--runs N] [--scale F] [--fresh] [--cache FOLDER]

Each part compares things that run in turns, in one session, on servers of their own, warm: round 0 is not counted. Figures are
medians over the rounds, ratios are taken between runs of the same round. Tables of 5 doubles a row are made by real builds and
kept in the cache folder. Needs redis-server, redis-cli and redis-benchmark. At a ``--scale`` other than 1 (rows and keys times
this) targets are not judged. Prints JSON lines; exits 1 where a target is missed. 24 GiB of memory are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from pyspark.sql import SparkSession

from benchmarks.online_project import FEATURES, USERS, published_project
from benchmarks.online_servers import flush, redis_cluster, redis_server, require_programs, set_rate, used_memory
from benchmarks.online_tables import DOUBLES, NEXT_DAY, VIEW, WHOLE, Shape, add_day, changed_copy, open_table
from benchmarks.processes import MemoryWatch, renew_workers
from benchmarks.report import Report, spark_session
from spark_fs.errors import InvalidError
from spark_fs.intervals import Interval
from spark_fs.materialize import MaterializeResult, materialize_view
from spark_fs.offline.tables import FeatureTable
from spark_fs.online.codec import key_bytes, key_prefix, redis_key
from spark_fs.online.redis_store import OnlineTarget
from spark_fs.registry import Registry

CACHE = Path(__file__).parents[1] / ".spark_fs" / "bench" / "online"
#: The write budget under which readers are watched, in rows a second, and how many seconds a run then takes.
BUDGET, BUDGET_SECONDS = 20_000, 10
#: Reads of each kind in a round.
READS = 500


def main() -> int:
    """Measure the chosen parts and print the figures."""
    arguments = _parse(sys.argv[1:])
    require_programs()
    cache = arguments.cache.resolve() / f"scale-{arguments.scale:g}"
    if arguments.fresh:
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        spark = spark_session(Path(scratch), "bench_online")
        bench = Bench(spark, cache, Path(scratch), arguments.scale, arguments.runs)
        for name in arguments.only:
            PARTS[name](bench)
        spark.stop()
    return bench.report.exit_code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds; parts of long runs take fewer")
    parser.add_argument("--scale", type=float, default=1.0, help="rows and keys times this")
    parser.add_argument("--fresh", action="store_true", help="make the tables anew")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    return arguments


@dataclass(frozen=True)
class Run:
    """A materialization that was timed."""

    seconds: float
    result: MaterializeResult

    @property
    def sent(self) -> int:
        """Rows that went to the server."""
        return self.result.applied + self.result.equal + self.result.stale


class Bench:
    """The session and the tables that all parts share, and their figures."""

    def __init__(self, spark: SparkSession, cache: Path, scratch: Path, scale: float, runs: int) -> None:
        self.spark, self.scratch, self.runs, self.report = spark, scratch, runs, Report()
        self._cache, self._scale, self._registries = cache, scale, 0

    def shape(self, rows: int, keys: int) -> Shape:
        """A table of so many rows and keys, at the benchmark's scale."""
        return Shape(int(rows * self._scale), int(keys * self._scale))

    def table(self, shape: Shape) -> FeatureTable:
        """The table, from the cache if it is there."""
        return open_table(self.spark, self._cache, shape)

    def registry(self) -> Registry:
        """A new one: nothing is published yet."""
        self._registries += 1
        return Registry(f"sqlite:///{self.scratch}/registry-{self._registries}.db", "bench")

    def publish(
        self,
        registry: Registry,
        table: FeatureTable,
        url: str,
        interval: Interval = WHOLE,
        *,
        everything: bool = False,
        restate: bool = False,
        budget: float = 0,
    ) -> Run:
        """Materialize and take the time, from the request to the last note in the registry."""
        target = OnlineTarget.of(url, VIEW, max_rows_per_second=budget)
        began = time.perf_counter()
        result = materialize_view(registry, table, target, interval, everything=everything, restate=restate)
        return Run(time.perf_counter() - began, result)

    def rounds(self, part: str, measure: Callable[[], dict[str, float]], *, most: int = 100) -> dict[str, list[float]]:
        """What the counted rounds gave, by name; round 0 warms up. ``most``: for parts that take minutes."""
        found: dict[str, list[float]] = {}
        for number in range(min(self.runs, most) + 1):
            measured = measure()
            told = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
            print(f"{part} round {number}: {told}", file=sys.stderr, flush=True)
            for name, value in measured.items():
                found.setdefault(name, []).extend([value] if number else [])
        return found

    def figure(self, name: str, values: Sequence[float], unit: str = "x", **target: float) -> None:
        """Median and spread; judged at full scale only."""
        spread = (min(values), max(values))
        self.report.figure(name, statistics.median(values), unit, spread=spread, judged=self._scale == 1, **target)

    def ratio(self, name: str, above: Sequence[float], below: Sequence[float], **target: float) -> None:
        """The ratio within each round."""
        self.figure(name, [one / other for one, other in zip(above, below, strict=True)], **target)


# ---- writing


def first(bench: Bench) -> None:
    """1 M keys for the first time, and again; beside plain clients."""
    shape = bench.shape(1_000_000, 1_000_000)
    table = bench.table(shape)

    with redis_server(bench.scratch / "first") as url:

        def measure() -> dict[str, float]:
            registry = bench.registry()
            empty = _emptied(url)
            written = bench.publish(registry, table, url)
            full = used_memory(url)
            again = bench.publish(registry, table, url, everything=True)
            unchanged = bench.publish(registry, table, url)
            assert written.result.applied == again.result.equal == shape.keys
            assert unchanged.sent == 0
            with redis.Redis.from_url(url) as client:
                value_bytes = client.strlen(redis_key(key_prefix(VIEW), key_bytes([1], VIEW.keys)))
            empty_again = _emptied(url)
            hset = _hset_rate(url, shape.keys // 5)
            hashes = used_memory(url)
            _emptied(url)
            return {
                "rows/s": shape.keys / written.seconds,
                "equal rows/s": shape.keys / again.seconds,
                "seconds": written.seconds,
                "replay seconds": again.seconds,
                "unchanged seconds": unchanged.seconds,
                "bytes a key": (full - empty) / shape.keys,
                "HSET rows/s": hset,
                "bytes a hash": (hashes - empty_again) / (shape.keys // 5),
                "SET rows/s": set_rate(url, shape.keys, value_bytes),
            }

        found = bench.rounds("first", measure)
    for name in ("rows/s", "equal rows/s", "HSET rows/s", "SET rows/s"):
        bench.figure(f"online_{name.replace(' ', '_').replace('/s', '_per_second')}", found[name], "rows/s")
    bench.ratio("online_write_vs_redis_benchmark_set", found["rows/s"], found["SET rows/s"], at_least=0.55)
    bench.ratio("online_write_vs_redis_py_hset", found["rows/s"], found["HSET rows/s"], at_least=4.0)
    bench.ratio("online_replay_vs_first_write", found["equal rows/s"], found["rows/s"], at_least=0.9)
    bench.ratio("online_unchanged_vs_replay_time", found["unchanged seconds"], found["replay seconds"], at_most=0.1)
    bench.ratio("online_memory_vs_hash", found["bytes a key"], found["bytes a hash"], at_most=0.75)


def newest(bench: Bench) -> None:
    """5 M rows of 200 k keys: what is read is large, what is written is small."""
    one, many = bench.shape(1_000_000, 1_000_000), bench.shape(5_000_000, 200_000)
    tables = [bench.table(shape) for shape in (one, many)]
    with redis_server(bench.scratch / "newest") as url:

        def measure() -> dict[str, float]:
            seconds = []
            for table in tables:
                flush(url)
                seconds.append(bench.publish(bench.registry(), table, url).seconds)
            return dict(zip(("1 M keys", "200 k keys"), seconds, strict=True))

        found = bench.rounds("newest", measure)
    bench.ratio("online_5m_rows_200k_keys_vs_1m_keys", found["200 k keys"], found["1 M keys"], at_most=0.5)


def changed(bench: Bench) -> None:
    """10 M rows of 1 M keys, then one key in a hundred gets a new row."""
    shape = bench.shape(10_000_000, 1_000_000)
    base = bench.table(shape)
    with redis_server(bench.scratch / "changed") as url:

        def measure() -> dict[str, float]:
            flush(url)
            registry = bench.registry()
            with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
                table = changed_copy(base, Path(folder) / "table")
                full = bench.publish(registry, table, url)
                new = add_day(table, shape, build=2)
                some = bench.publish(registry, table, url, Interval(WHOLE.start, NEXT_DAY.end))
            assert (full.result.applied, some.result.applied) == (shape.keys, new)
            return {"full": full.seconds, "changed": some.seconds, "sent by full": full.sent, "sent by changed": some.sent}

        found = bench.rounds("changed", measure, most=3)
    bench.ratio("online_changed_rows_sent_vs_full", found["sent by changed"], found["sent by full"], at_most=0.05)
    bench.ratio("online_changed_time_vs_full", found["changed"], found["full"], at_most=0.15)


def tenfold(bench: Bench) -> None:
    """Ten times the keys: time and memory of the workers."""
    shapes = {"1 M": bench.shape(1_000_000, 1_000_000), "10 M": bench.shape(10_000_000, 10_000_000)}
    tables = {name: bench.table(shape) for name, shape in shapes.items()}
    with redis_server(bench.scratch / "tenfold") as url:

        def measure() -> dict[str, float]:
            measured = {}
            for name, table in tables.items():
                flush(url)
                renew_workers()
                with _watched() as watch:
                    run = bench.publish(bench.registry(), table, url)
                assert run.result.applied == shapes[name].keys
                measured |= {f"{name} seconds": run.seconds, f"{name} bytes": watch.peaks["worker_max_bytes"]}
            return measured

        found = bench.rounds("tenfold", measure, most=2)
    bench.ratio("online_10m_keys_vs_1m_keys", found["10 M seconds"], found["1 M seconds"], at_most=11)
    bench.ratio("online_10m_keys_worker_memory_vs_1m_keys", found["10 M bytes"], found["1 M bytes"], at_most=1.3)
    bench.figure("online_worker_memory", [size / 2**20 for size in found["10 M bytes"]], "MiB")


def cluster(bench: Bench) -> None:
    """Three masters on this machine, beside one server."""
    shape = bench.shape(1_000_000, 1_000_000)
    table = bench.table(shape)
    with redis_server(bench.scratch / "alone") as alone, redis_cluster(bench.scratch / "cluster") as (together, masters):
        try:
            OnlineTarget.of(together, VIEW)
            bench.publish(bench.registry(), table, together)
        except InvalidError as error:
            sys.exit(f"cluster: {error}")

        def measure() -> dict[str, float]:
            rates = {}
            for name, url in (("alone", alone), ("cluster", together)):
                flush(alone, *masters)
                run = bench.publish(bench.registry(), table, url)
                assert run.result.applied == shape.keys
                rates[name] = shape.keys / run.seconds
            return rates

        found = bench.rounds("cluster", measure)
    bench.ratio("online_cluster_vs_standalone", found["cluster"], found["alone"], at_least=0.8)


def _hset_rate(url: str, keys: int) -> float:
    """Rows per second of pipelined HSETs of 500 rows, one field per feature, as a plain client writes them."""
    randomly = random.Random(7)
    rows = [{f"f{n}": randomly.random() for n in range(DOUBLES)} for _ in range(keys)]
    with redis.Redis.from_url(url) as client:
        began = time.perf_counter()
        for start in range(0, keys, 500):
            pipeline = client.pipeline(transaction=False)
            for key in range(start, min(start + 500, keys)):
                pipeline.hset(f"bench:values@1:{key}", mapping=rows[key])
            pipeline.execute()
        return keys / (time.perf_counter() - began)


def _emptied(url: str) -> int:
    """Empty the server; what it uses then."""
    flush(url)
    return used_memory(url)


@contextmanager
def _watched() -> Iterator[MemoryWatch]:
    """The peaks of memory below this process during the block."""
    watch, ended = MemoryWatch(os.getpid()), threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            watch.sample()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


# ---- reading


def read(bench: Bench) -> None:
    """100 entities, 10 features of 2 views: the SDK beside a bare MGET of the same keys."""
    with redis_server(bench.scratch / "read") as url, redis.Redis.from_url(url, protocol=2) as client:
        store = published_project(bench.scratch / "project", bench.spark, url)
        views = [selection.view for selection in store.resolve_features(FEATURES)]
        randomly = random.Random(7)

        def measure() -> dict[str, float]:
            taken: dict[str, list[float]] = {"sdk": [], "mget": []}
            for number in range(READS):
                users = randomly.sample(range(USERS), 100)
                keys = [redis_key(key_prefix(view), key_bytes([user], view.keys)) for view in views for user in users]
                arms: dict[str, Callable[[], Any]] = {
                    "sdk": lambda users=users: store.get_online_features(FEATURES, {"user_id": users}).to_dict(),
                    "mget": lambda keys=keys: client.mget(keys),
                }
                # Each first as often as second: the second finds the server's memory warm.
                for name in sorted(arms, reverse=number % 2 == 0):
                    began = time.perf_counter()
                    found = arms[name]()
                    taken[name].append(time.perf_counter() - began)
                    assert None not in (found if name == "mget" else found[FEATURES[0].partition(":")[2]])
            milliseconds = {name: statistics.median(times) * 1000 for name, times in taken.items()}
            return {**milliseconds, "sdk p99": statistics.quantiles(taken["sdk"], n=100)[98] * 1000}

        found = bench.rounds("read", measure)
    bench.ratio("online_read_vs_mget", found["sdk"], found["mget"], at_most=2.5)
    bench.figure("online_read_p50", found["sdk"], "ms", at_most=1.2)
    bench.figure("online_read_p99", found["sdk p99"], "ms")


def budget(bench: Bench) -> None:
    """A reader's slowest answers while a materialization runs: under a budget, and without."""
    shape = bench.shape(1_000_000, 1_000_000)
    table = bench.table(shape)
    with redis_server(bench.scratch / "budget") as url:
        registry = bench.registry()
        bench.publish(registry, table, url)

        def measure() -> dict[str, float]:
            with _reader(url, shape.keys) as idle:
                time.sleep(BUDGET_SECONDS)
            some = shape.first(min(BUDGET * BUDGET_SECONDS, shape.rows))
            with _reader(url, shape.keys) as busy:
                # A restatement: every row is compared with what is there, and written.
                run = bench.publish(registry, table, url, some, restate=True, budget=BUDGET)
            with _reader(url, shape.keys) as crowded:
                for _ in range(2):
                    bench.publish(registry, table, url, restate=True)
            return {
                "idle": _p99(idle),
                "under budget": _p99(busy),
                "without": _p99(crowded),
                "rows/s under budget": run.sent / run.seconds,
            }

        found = bench.rounds("budget", measure, most=3)
    bench.ratio("online_read_p99_under_budget_vs_idle", found["under budget"], found["idle"], at_most=3.0)
    bench.ratio("online_read_p99_without_budget_vs_idle", found["without"], found["idle"])
    bench.figure("online_read_p99_idle", found["idle"], "ms")
    bench.figure("online_rows_per_second_under_budget", found["rows/s under budget"], "rows/s")


@contextmanager
def _reader(url: str, keys: int) -> Iterator[list[float]]:
    """A process that reads during the block; the list has its latencies in milliseconds afterwards."""
    argv = [sys.executable, "-m", "benchmarks.online_reader", url, str(keys)]
    latencies: list[float] = []
    root = Path(__file__).parents[1]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield latencies
        process.stdin.close()
        latencies += json.loads(process.stdout.read())


def _p99(latencies: Sequence[float]) -> float:
    return statistics.quantiles(latencies, n=100)[98]


PARTS: dict[str, Callable[[Bench], None]] = {
    part.__name__: part for part in (first, newest, changed, tenfold, read, budget, cluster)
}


if __name__ == "__main__":
    sys.exit(main())
