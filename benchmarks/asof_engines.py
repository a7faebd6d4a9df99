"""One engine of bench_asof in a process of its own: runs what it is asked on stdin, answers in JSON lines on stdout.

    python -m benchmarks.asof_engines spark|duckdb|polars --cache FOLDER --scale F [--cores N] [--memory 8g]

Every arm of a training set does the same work: the as-of join, then one aggregate over all columns of the result (``rows``,
sums of the spine's columns and of each feature, matches of each view), so that nothing can be left out. The arm
``shuffle`` is the exception: it joins nothing, see ``_shuffle_only``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

from deltalake import DeltaTable

from benchmarks.asof_data import KEY, SPINE_COLUMNS, TIME, Cache, Training, View, training_sets, write_project

#: What a run found: figures that must be the same in every engine.
Sums = dict[str, float]
_PREPARED = Callable[[], Sums]


class Engine(Protocol):
    """Runs arms; ``start`` does what no user waits for and returns what is timed."""

    def start(self, arm: str, training: Training) -> _PREPARED: ...

    def renew_workers(self) -> None: ...

    def before(self) -> None: ...

    def after(self) -> dict[str, Any]: ...


class Spark:
    """All Spark arms and the writing of tables, in one session."""

    def __init__(self, cache: Cache, scratch: Path, cores: int, memory: str) -> None:
        from benchmarks.report import spark_session

        self.cache, self.scratch = cache, scratch
        self.session = spark_session(scratch, "bench_asof", memory=memory, cores=cores)
        self._jvm: Any = self.session.sparkContext._jvm
        self._context: Any = self.session.sparkContext._jsc.sc()
        self._first_stage, self._plan = 0, {}  # type: tuple[int, dict[str, Any]]
        self._bounds: dict[str, tuple[int, int]] = {}

    def start(self, arm: str, training: Training) -> _PREPARED:
        """The arm as a function to be timed."""
        if arm in ("colocated", "window"):
            return lambda: self._ours(arm, training)
        if arm in ("build", "plain_write"):
            return self._writing(arm, training)
        if arm == "range":
            return lambda: self._sums(self._range_join(training), training)
        assert arm == "shuffle"
        bounds = self._spine_bounds(training)
        return lambda: self._shuffle_only(training, bounds)

    def prepare(self, training: Training) -> None:
        """Generate and build what the training set needs."""
        self.cache.prepare(self.session, training)

    def _ours(self, strategy: str, training: Training) -> Sums:
        """As a user asks for it: reading the registry, counting the spine, planning, joining."""
        store = self.cache.open(self.session, training.tables)
        spine = str(self.cache.spine(training))
        job = store.get_historical_features(spine, training.references, strategy=strategy)
        found = self._sums(job.to_spark_df(), training)
        self._plan = job.plan.to_json()
        return found

    def _sums(self, joined: Any, training: Training) -> Sums:
        from pyspark.sql import functions as F

        columns = [F.count(F.lit(1)).alias("rows"), F.sum(KEY).alias(KEY), F.sum("label").alias("label")]
        columns.append(F.sum(F.unix_micros(TIME).cast("double")).alias(TIME))
        for view in training.views:
            features = training.features(view)
            columns += [F.count(features[0]).alias(f"matches_{view.name}"), *(F.sum(name).alias(name) for name in features)]
        return dict(joined.agg(*columns).first().asDict())

    def _frame(self, training: Training, view: View) -> Any:
        path = str(self.cache.table(training.tables, view))
        return self.session.read.format("delta").load(path).select(KEY, TIME, "created_timestamp", *training.features(view))

    def _spine(self, training: Training) -> Any:
        return self.session.read.parquet(str(self.cache.spine(training)))

    def _range_join(self, training: Training) -> Any:
        from benchmarks.feast_shape import feast_shaped_join

        return feast_shaped_join(
            self._spine(training),
            {view.name: self._frame(training, view) for view in training.views},
            KEY,
            {view.name: training.features(view) for view in training.views},
            {view.name: view.ttl for view in training.views},
        )

    def _spine_bounds(self, training: Training) -> tuple[int, int]:
        """The spine's first and last time in microseconds; looked up once, not timed."""
        from pyspark.sql import functions as F

        if training.name not in self._bounds:
            row = self._spine(training).agg(F.min(F.unix_micros(TIME)), F.max(F.unix_micros(TIME))).first()
            self._bounds[training.name] = (row[0], row[1])
        return self._bounds[training.name]

    def _shuffle_only(self, training: Training, bounds: tuple[int, int]) -> Sums:
        """What any plan must pay that brings all rows of a key together: no join, only the way there.

        Rows as narrow as can be: key, time and as many values as the widest side has; what is too early or too late is
        dropped before, by bounds that cost nothing. Then one shuffle by key, one sort by key and time, one aggregate.
        """
        from pyspark.sql import functions as F

        def narrow(frame: Any, values: tuple[str, ...]) -> Any:
            padded = [*values, *[None] * (training.asked - len(values))]
            slots = [(F.col(v) if v else F.lit(None)).cast("double").alias(f"slot{n}") for n, v in enumerate(padded)]
            return frame.select(KEY, F.unix_micros(TIME).alias("time"), *slots)

        sides = [narrow(self._spine(training), ("label",))]
        for view in training.views:
            frame = self._frame(training, view).where(F.col(TIME) <= F.timestamp_micros(F.lit(bounds[1])))
            if view.ttl_days:
                earliest = bounds[0] - view.ttl_days * 86_400_000_000
                frame = frame.where(F.col(TIME) >= F.timestamp_micros(F.lit(earliest)))
            sides.append(narrow(frame, training.features(view)))
        rows = reduce(lambda left, right: left.unionAll(right), sides)
        placed = rows.repartition(KEY).sortWithinPartitions(KEY, "time")
        # Sums of doubles depend on the order of rows, so that Spark may not leave out the sort.
        sums = [F.sum(F.col(name).cast("double")).alias(name) for name in rows.columns]
        found = placed.agg(F.count(F.lit(1)).alias("rows"), *sums).first()
        return {"shuffled_rows": found["rows"]}

    def _writing(self, arm: str, training: Training) -> _PREPARED:
        """The first view's source into a feature table of a new project, or into a plain Delta table."""
        view = training.views[0]
        sources = self.cache.source(training.tables, view.source).parent
        folder = self.scratch / "written"
        shutil.rmtree(folder, ignore_errors=True)
        if arm == "plain_write":
            return lambda: self._plain_write(sources / view.source.name, folder, view)
        from spark_fs import FeatureStore

        write_project(folder, (view,), sources)
        store = FeatureStore(folder, "bench", spark=self.session)
        store.apply()
        return lambda: {"rows_written": sum(result.rows_written for result in store.build())}

    def _plain_write(self, source: Path, folder: Path, view: View) -> Sums:
        self.session.read.parquet(str(source)).write.format("delta").save(str(folder))
        return {"rows_written": view.source.rows}

    def renew_workers(self) -> None:
        """End the idle Python workers, so that the next run's memory is its own."""
        from benchmarks.processes import renew_workers

        renew_workers()

    def before(self) -> None:
        """Begin the counting of one run."""
        self._plan = {}
        self._jvm.System.gc()
        for pool in self._heap_pools():
            pool.resetPeakUsage()
        self._first_stage = max((stage.stageId() for stage in self._stages()), default=-1) + 1

    def after(self) -> dict[str, Any]:
        """Bytes of the stages since then, the heap's peak, and what the plan says of itself.

        Bytes read are not among them: Spark does not see those of vectored reads.
        """
        self._context.listenerBus().waitUntilEmpty()
        stages = [stage for stage in self._stages() if stage.stageId() >= self._first_stage]
        return {
            "shuffle_bytes": sum(stage.shuffleWriteBytes() for stage in stages),
            "spilled_bytes": sum(stage.diskBytesSpilled() for stage in stages),
            "heap_peak_bytes": sum(pool.getPeakUsage().getUsed() for pool in self._heap_pools()),
            "plan": self._plan,
        }

    def _stages(self) -> list[Any]:
        """The status of all stages; the store behind Spark's pages is kept also where these are switched off."""
        gateway: Any = self.session.sparkContext._gateway
        none = gateway.new_array(self._jvm.double, 0)
        found = self._context.statusStore().stageList(None, False, False, none, self._jvm.java.util.ArrayList())
        return [found.apply(n) for n in range(found.size())]

    def _heap_pools(self) -> Iterator[Any]:
        for pool in self._jvm.java.lang.management.ManagementFactory.getMemoryPoolMXBeans():
            if pool.getType().name() == "HEAP":
                yield pool


class _Local:
    """What the engines without Spark share: they read the same files, and keep no workers."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def files(self, training: Training, view: View) -> list[str]:
        """The data files of the newest version of a feature table."""
        return DeltaTable(self.cache.table(training.tables, view)).file_uris()

    def renew_workers(self) -> None:
        """Nothing to renew."""

    def before(self) -> None:
        """Nothing is counted."""

    def after(self) -> dict[str, Any]:
        """Nothing is counted."""
        return {}


class DuckDB(_Local):
    """ASOF LEFT JOIN of DuckDB over the files of the feature tables."""

    def __init__(self, cache: Cache, cores: int) -> None:
        import duckdb

        super().__init__(cache)
        self.connection = duckdb.connect(config={"threads": cores})

    def start(self, arm: str, training: Training) -> _PREPARED:
        """One query: joins, ttl, aggregate."""
        assert arm == "duckdb"
        query = self._query(training)

        def run() -> Sums:
            cursor = self.connection.execute(query)
            row = cursor.fetchone()
            assert row is not None
            assert cursor.description is not None
            return {column[0]: value for column, value in zip(cursor.description, row, strict=True)}

        return run

    def _query(self, training: Training) -> str:
        spine = str(self.cache.spine(training))
        outputs, joins = [f"s.{name}" for name in SPINE_COLUMNS], [f"FROM read_parquet('{spine}') s"]
        sums = ["count(*) AS rows", f"sum({KEY}) AS {KEY}", "sum(label) AS label", f"sum(epoch_us({TIME})::DOUBLE) AS {TIME}"]
        for view in training.views:
            features, name = training.features(view), view.name
            columns = ", ".join([KEY, TIME, *features])
            files = f"read_parquet({self.files(training, view)!r}, hive_partitioning = false)"
            joins.append(
                f"ASOF LEFT JOIN (SELECT {columns} FROM {files}) {name} ON s.{KEY} = {name}.{KEY} AND s.{TIME} >= {name}.{TIME}"
            )
            fresh = f"{name}.{TIME} >= s.{TIME} - INTERVAL {view.ttl_days} DAY" if view.ttl_days else "TRUE"
            outputs += [f"CASE WHEN {fresh} THEN {name}.{feature} END AS {feature}" for feature in features]
            sums += [f"count({features[0]}) AS matches_{name}", *(f"sum({feature}) AS {feature}" for feature in features)]
        return f"SELECT {', '.join(sums)} FROM (SELECT {', '.join(outputs)} {' '.join(joins)})"


class Polars(_Local):
    """join_asof of polars over the files of the feature tables, which each hold whole keys in order of time.

    So the tables must be of one build; several would have to be sorted first.
    """

    def start(self, arm: str, training: Training) -> _PREPARED:
        """One lazy query, collected by the streaming engine."""
        assert arm == "polars"
        return lambda: self._query(training)

    def _query(self, training: Training) -> Sums:
        import polars as pl

        joined = pl.scan_parquet(self.cache.spine(training)).sort(TIME)
        found = [
            pl.len().alias("rows"),
            pl.col(KEY).sum(),
            pl.col("label").sum(),
            pl.col(TIME).dt.epoch().cast(pl.Float64).sum(),
        ]
        for view in training.views:
            features = training.features(view)
            rows = pl.scan_parquet(self.files(training, view), hive_partitioning=False).select(KEY, TIME, *features)
            joined = joined.join_asof(rows, on=TIME, by=KEY, tolerance=view.ttl, check_sortedness=False)
            found += [pl.col(features[0]).count().alias(f"matches_{view.name}"), *(pl.col(name).sum() for name in features)]
        return dict(joined.select(found).collect(engine="streaming").row(0, named=True))


def _timed_run(engine: Engine, arm: str, training: Training, *, renew: bool) -> dict[str, Any]:
    job = engine.start(arm, training)
    if renew:
        engine.renew_workers()
    gc.collect()
    engine.before()
    begin = time.perf_counter()
    sums = job()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "sums": sums, **engine.after()}


def _answer(engine: Engine, trainings: dict[str, Training], request: dict[str, Any]) -> dict[str, Any]:
    training = trainings[request["training"]]
    try:
        if request["do"] == "prepare":
            assert isinstance(engine, Spark)
            engine.prepare(training)
            return {}
        return _timed_run(engine, request["arm"], training, renew=request["renew"])
    except Exception as error:  # noqa: BLE001  # one arm that fails must not end the others
        traceback.print_exc()
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}


def main() -> int:
    """Answer requests until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["spark", "duckdb", "polars"])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--scale", type=float, required=True)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--memory", default="8g")
    parser.add_argument("--cpus", type=int, help="run on so many processors of this machine, whatever the engine starts")
    arguments = parser.parse_args()
    if arguments.cpus:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cpus])
    # Whatever the JVM prints goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cache, trainings = Cache(arguments.cache), training_sets(arguments.scale)
    with tempfile.TemporaryDirectory(dir=arguments.cache, prefix="scratch-") as scratch:
        engine = _engine(arguments, cache, Path(scratch))
        for line in sys.stdin:
            print(json.dumps(_answer(engine, trainings, json.loads(line))), file=answers, flush=True)
        if isinstance(engine, Spark):
            engine.session.stop()
    return 0


def _engine(arguments: argparse.Namespace, cache: Cache, scratch: Path) -> Engine:
    if arguments.engine == "spark":
        return Spark(cache, scratch, arguments.cores, arguments.memory)
    if arguments.engine == "duckdb":
        return DuckDB(cache, arguments.cores)
    os.environ["POLARS_MAX_THREADS"] = str(arguments.cores)  # read when polars is first imported
    return Polars(cache)


if __name__ == "__main__":
    sys.exit(main())
