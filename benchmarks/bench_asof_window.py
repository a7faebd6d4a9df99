"""How fast the window as-of join is beside Feast's plan shape on the same data, Spark and run.

    python -m benchmarks.bench_asof_window [--spine-rows N] [--view-rows N N] [--keys N] [--runs N] …

Prints one JSON line per figure; exits 1 where the target is missed.
Runs alternate and medians are compared, so that a busy machine slows both sides alike. Data goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from benchmarks.feast_shape import feast_shaped_join
from benchmarks.report import Report, spark_session
from spark_fs.offline.asof import AsofView, execute, plan_asof, spine_stats

KEY = "user_id"
HISTORY_SECONDS = 60 * 86_400
DOUBLES = 5


def main() -> int:
    """Write the data, run both joins in turns, print the figures."""
    arguments = _parse(sys.argv[1:])
    ttl = timedelta(days=arguments.ttl_days) if arguments.ttl_days else None
    with tempfile.TemporaryDirectory() as folder:
        partitions = arguments.shuffle_partitions
        spark = spark_session(Path(folder), "bench_asof_window", memory=arguments.memory, partitions=partitions)
        try:
            spine, frames = _data(spark, arguments, Path(folder))
            window = _timed(lambda: _window_join(spine, frames, ttl))
            feast = _timed(lambda: feast_shaped_join(spine, frames, KEY, {name: _features(name) for name in frames}, ttl))
            seconds: dict[str, list[float]] = {"window": [], "feast_shape": []}
            for run in range(arguments.runs + 1):  # run 0 warms the JVM and the page cache and is not counted
                for name, join in (("window", window), ("feast_shape", feast)):
                    took = join()
                    print(f"run {run} {name} {took:.1f} s", file=sys.stderr)
                    if run:
                        seconds[name].append(took)
        finally:
            spark.stop()
    report = Report()
    for name, taken in seconds.items():
        report.figure(f"asof_{name}_seconds", statistics.median(taken), "s", spread=(min(taken), max(taken)))
    ratios = [theirs / ours for ours, theirs in zip(seconds["window"], seconds["feast_shape"], strict=True)]
    spread = (min(ratios), max(ratios))
    report.figure("asof_window_vs_feast_shape", statistics.median(ratios), "x", spread=spread, at_least=arguments.target)
    return report.exit_code


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


if __name__ == "__main__":
    sys.exit(main())
