"""How fast the window as-of join is beside Feast's plan shape on the same data, Spark and run.

    python benchmarks/bench_asof_window.py [--spine-rows N] [--view-rows N N] [--keys N] [--runs N] …

Prints one JSON line per figure: {"name", "value", "unit", "target", "met"}; target and met are null for plain readings.
Runs alternate and medians are compared, so that a busy machine slows both sides alike. Data goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from feast_shape import feast_shaped_join
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_fs.offline.asof import AsofView, execute, plan_asof, spine_stats

KEY = "user_id"
HISTORY_SECONDS = 60 * 86_400
DOUBLES = 5


def main() -> None:
    """Write the data, run both joins in turns, print the figures."""
    arguments = _parse(sys.argv[1:])
    ttl = timedelta(days=arguments.ttl_days) if arguments.ttl_days else None
    with tempfile.TemporaryDirectory() as folder:
        spark = _session(arguments, Path(folder))
        try:
            spine, frames = _data(spark, arguments, Path(folder))
            window = _timed(lambda: _window_join(spine, frames, ttl))
            feast = _timed(lambda: feast_shaped_join(spine, frames, KEY, {name: _features(name) for name in frames}, ttl))
            seconds: dict[str, list[float]] = {"window": [], "feast": []}
            for run in range(arguments.runs + 1):  # run 0 warms the JVM and the page cache and is not counted
                for name, join in (("window", window), ("feast", feast)):
                    took = join()
                    print(f"run {run} {name} {took:.1f} s", file=sys.stderr)
                    if run:
                        seconds[name].append(took)
        finally:
            spark.stop()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    _report("asof_window_seconds", medians["window"], "s")
    _report("asof_feast_shape_seconds", medians["feast"], "s")
    _report("asof_window_speedup_over_feast_shape", medians["feast"] / medians["window"], "x", at_least=arguments.target)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spine-rows", type=int, default=1_000_000)
    parser.add_argument("--view-rows", type=int, nargs="+", default=[10_000_000, 5_000_000])
    parser.add_argument("--keys", type=int, default=200_000)
    parser.add_argument("--ttl-days", type=float, default=30.0, help="0: no ttl; the history covers 60 days")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shuffle-partitions", type=int, default=8)
    parser.add_argument("--memory", default="8g")
    parser.add_argument("--target", type=float, default=2.0, help="the least speed-up that counts as met")
    return parser.parse_args(argv)


def _session(arguments: argparse.Namespace, folder: Path) -> SparkSession:
    return (
        SparkSession.Builder()
        .master("local[2]")
        .appName("bench_asof_window")
        .config("spark.driver.memory", arguments.memory)
        .config("spark.sql.shuffle.partitions", arguments.shuffle_partitions)
        .config("spark.local.dir", str(folder / "scratch"))  # shuffle files vanish with the folder
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .getOrCreate()
    )


def _data(spark: SparkSession, arguments: argparse.Namespace, folder: Path) -> tuple[DataFrame, dict[str, DataFrame]]:
    """Rows in order of arrival: keys at random, times rising, values random doubles."""
    start = 1_700_000_000
    second_half = F.lit(start + HISTORY_SECONDS // 2) + (F.rand(1) * HISTORY_SECONDS / 2)
    spine = spark.range(arguments.spine_rows).select(
        F.floor(F.rand(2) * arguments.keys).alias(KEY),
        F.timestamp_micros((second_half * 1e6).cast("bigint")).alias("event_timestamp"),
        F.col("id").alias("label"),
    )
    frames = {"spine": spine}
    for number, rows in enumerate(arguments.view_rows, 1):
        name = f"view{number}"
        micros = F.lit(start * 1_000_000) + (F.col("id") * F.lit(HISTORY_SECONDS * 1_000_000 / rows)).cast("bigint")
        values = [F.rand(100 * number + n).alias(feature) for n, feature in enumerate(_features(name))]
        frames[name] = spark.range(rows).select(
            F.floor(F.rand(10 * number) * arguments.keys).alias(KEY),
            F.timestamp_micros(micros).alias("event_timestamp"),
            F.timestamp_micros(micros + 60_000_000).alias("created_timestamp"),
            *values,
        )
    stored = {}
    for name, frame in frames.items():
        path = str(folder / name)
        frame.write.parquet(path)
        stored[name] = spark.read.parquet(path)
    return stored.pop("spine"), stored


def _features(name: str) -> list[str]:
    return [f"{name}_f{n}" for n in range(DOUBLES)]


def _window_join(spine: DataFrame, frames: dict[str, DataFrame], ttl: timedelta | None) -> DataFrame:
    """As a training set asks for it: statistics of the spine, plan, join; ties are not settled beforehand."""
    views = [
        AsofView(
            name=name,
            keys=((KEY, KEY),),
            features=tuple((feature, feature) for feature in _features(name)),
            columns=tuple(frame.dtypes),
            created_time="created_timestamp",
            ttl=ttl,
            hash_columns=tuple(_features(name)),
        )
        for name, frame in frames.items()
    ]
    stats = spine_stats(spine, "event_timestamp", [(KEY,)])
    return execute(plan_asof(views, spine.dtypes, stats=stats), spine, frames)


def _timed(join: Callable[[], DataFrame]) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        join().write.format("noop").mode("overwrite").save()
        return time.perf_counter() - begin

    return run


def _report(name: str, value: float, unit: str, at_least: float | None = None) -> None:
    met = None if at_least is None else value >= at_least
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "target": at_least, "met": met}))


if __name__ == "__main__":
    main()
