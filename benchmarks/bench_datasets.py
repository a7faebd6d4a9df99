"""What a saved dataset costs beside its rows alone: ``make bench-datasets``.

    python -m benchmarks.bench_datasets [--only save,read] [--rounds N] [--scale F] [--cache FOLDER]

``save``: the workload ``medium`` of ``bench-asof`` (1 M spine rows, 10 M + 5 M feature rows), saved with manifest, checksum,
split and report, beside the same join written by Delta's own writer; and ``verify``, which joins it again, beside that save.
``read``: a dataset of 1 M rows and 20 columns into Arrow without Spark, beside pyarrow on the same files. Arms run in turns in
one process, warm; ratios are taken between runs of one round, figures are medians. Prints JSON lines; exits 1 where a target is
missed. At a ``--scale`` other than 1 targets are not judged.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from benchmarks.asof_data import Cache, Training, training_sets
from benchmarks.bench_asof import CACHE
from benchmarks.report import Report, spark_session
from spark_fs import FeatureStore
from spark_fs.datasets.splits import RandomSplit

PARTS = ("save", "read")


def main() -> int:
    """Measure the chosen parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="rows and keys times this")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args(sys.argv[1:])
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    report, judged = Report(), arguments.scale == 1
    with tempfile.TemporaryDirectory(dir=arguments.cache.parent) as folder:
        spark = spark_session(Path(folder), "bench_datasets")
        training = training_sets(arguments.scale)["medium"]
        cache = Cache(arguments.cache / f"scale-{arguments.scale:g}")
        cache.prepare(spark, training)
        if "save" in arguments.only:
            _save(report, spark, cache, training, Path(folder), arguments.rounds, judged=judged)
        if "read" in arguments.only:
            _read(report, spark, cache, training, Path(folder), arguments.rounds, judged=judged)
        spark.stop()
    return report.exit_code


def _save(
    report: Report, spark: SparkSession, cache: Cache, training: Training, folder: Path, rounds: int, *, judged: bool
) -> None:
    store = cache.open(spark, training.tables)

    def bare() -> None:
        job = store.get_historical_features(str(cache.spine(training)), training.references)
        job.to_spark_df().write.format("delta").mode("overwrite").save(str(folder / "bare"))

    def save() -> None:
        job = store.get_historical_features(str(cache.spine(training)), training.references)
        # Another description each time: a save of the same would not be kept.
        job.save("bench", split=RandomSplit((0.8, 0.2)), labels=["label"], description=str(time.time()))

    def verify() -> None:
        assert store.datasets.verify("bench").identical

    seconds = _in_turns([bare, save, verify], rounds)
    _ratio(report, "save : bare write", seconds[1], seconds[0], at_most=1.5, judged=judged)
    _ratio(report, "verify : save", seconds[2], seconds[1], at_most=1.2, judged=judged)
    _forget(store)


def _read(
    report: Report, spark: SparkSession, cache: Cache, training: Training, folder: Path, rounds: int, *, judged: bool
) -> None:
    store, rows = cache.open(spark, training.tables), training.spine_rows
    more = [(F.rand(n) if n % 2 else F.floor(F.rand(n) * 1_000)).alias(f"c{n}") for n in range(8)]
    spark.read.parquet(str(cache.spine(training))).select("*", *more).write.parquet(str(folder / "spine"))
    dataset = store.get_historical_features(str(folder / "spine"), training.references[:9]).save("bench")
    files = [file.removeprefix("file:") for file in dataset.to_spark_df().inputFiles()]

    def bare() -> None:
        assert pq.ParquetDataset(files).read().num_rows == rows

    def read() -> None:
        assert dataset.to_arrow().num_rows == rows

    seconds = _in_turns([bare, read], max(rounds, 9))
    name = f"{len(dataset.manifest.columns)} columns into Arrow : bare Parquet"
    _ratio(report, name, seconds[1], seconds[0], at_most=1.5, judged=judged)
    _forget(store)


def _in_turns(arms: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """The seconds of each arm by round; two rounds before do not count."""
    seconds: list[list[float]] = [[] for _ in arms]
    for number in range(-2, rounds):
        for arm, taken in zip(arms, seconds, strict=True):
            began = time.perf_counter()
            arm()
            took = time.perf_counter() - began
            print(f"round {number} {arm.__name__}: {took:.2f} s", file=sys.stderr, flush=True)
            taken += [took] if number >= 0 else []
    return seconds


def _ratio(report: Report, name: str, ours: Sequence[float], theirs: Sequence[float], *, at_most: float, judged: bool) -> None:
    ratios = [left / right for left, right in zip(ours, theirs, strict=True)]
    spread = (min(ratios), max(ratios))
    report.figure(name, statistics.median(ratios), "x", spread=spread, at_most=at_most, judged=judged)


def _forget(store: FeatureStore) -> None:
    """Take the datasets of the benchmark away."""
    for saved in store.datasets.list():
        store.registry.datasets.forget(saved["name"], saved["version"])
        shutil.rmtree(saved["path"], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
