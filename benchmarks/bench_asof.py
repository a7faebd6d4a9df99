"""How fast the as-of join is, beside all that could do the same work on the same tables: ``make bench-asof``.

    python -m benchmarks.bench_asof [--only medium,deep,…] [--runs N] [--scale F] [--fresh] [--report] [--cache FOLDER]

Arms: our ``colocated`` and ``window``; ``range``, the plan shape of Feast; ``shuffle``, what any plan that shuffles must
pay; DuckDB and polars on the same Parquet files. All run on two cores, each engine in a process of its own (our
``colocated`` as well: the other plans of Spark share one), one at a time and in turns, warm: the first run of each is not
counted, nor are two more of the quicker arms and one before each that counts; one that takes more than five minutes is run
once, and counts.
Ratios are taken between runs of the same round. Ours are timed from the request on: registry, count of the spine, plan, join.
The sums over all columns must agree between the arms, else the benchmark ends at once.

Data, feature tables and runs stay in the cache folder, so that workloads can be measured one by one; ``--report`` judges what
is there. At a ``--scale`` other than 1 targets are not judged. Prints JSON lines, then Markdown; exits 1 where a target is
missed or was not measured. All workloads need some 40 GB of disk and hours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.asof_data import Cache, Training, training_sets
from benchmarks.asof_process import EngineProcess
from benchmarks.asof_report import report_workload
from benchmarks.asof_workloads import SESSIONS, WORKLOADS, Cell, Workload
from benchmarks.report import Report

CACHE = Path(__file__).parents[1] / ".spark_fs" / "bench" / "asof"
#: The counted runs of an arm whose first counted run took up to so many seconds; slower ones get two.
_RUNS_BY_SECONDS = ((20, 5), (60, 3))
#: An arm whose first run took longer than so many seconds is not run again: what it lacks in warmth is a hundredth of that.
_SLOW_SECONDS = 300
#: An arm whose first run took up to so many seconds is run twice more before runs count, for the JVM compiles for several
#: runs, and once before each that counts, for Spark ends Python workers that were idle for the minute which slow arms take.
_QUICK_SECONDS, _WARM_UPS = 40, 2
_PACKAGES = ("spark-fs", "pyspark", "delta-spark", "pyarrow", "numpy", "duckdb", "polars")


def main() -> int:
    """Measure the chosen workloads, or only read what was measured; print the figures."""
    arguments = _parse(sys.argv[1:])
    cache = arguments.cache / f"scale-{arguments.scale:g}"
    if arguments.fresh:
        shutil.rmtree(cache, ignore_errors=True)
    report, pages = Report(), []
    for name in arguments.only:
        bench = Bench(cache, arguments.scale, WORKLOADS[name])
        if not arguments.report:
            bench.measure(arguments.runs)
        pages.append(report_workload(report, bench.workload, bench.kept_runs(), judged=arguments.scale == 1))
    print("", *pages, sep="\n")
    return report.exit_code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(WORKLOADS), help=f"of {','.join(WORKLOADS)}")
    parser.add_argument("--runs", type=int, default=5, help="the most counted runs of an arm; slow arms get fewer")
    parser.add_argument("--scale", type=float, default=1.0, help="rows and keys times this")
    parser.add_argument("--fresh", action="store_true", help="make data and tables anew; runs of the same scale go too")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only) - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown workloads: {', '.join(sorted(unknown))}")
    return arguments


class Bench:
    """One workload in one cache folder."""

    def __init__(self, cache: Path, scale: float, workload: Workload) -> None:
        self.cache, self.workload = Cache(cache.resolve()), workload
        self.trainings = training_sets(scale)
        self._common = ["--cache", str(self.cache.root), "--scale", str(scale)]
        self._results = self.cache.root / "results" / f"{workload.name}.jsonl"
        self._sums: dict[tuple[str, ...], dict[str, float]] = {}

    def kept_runs(self) -> list[dict[str, Any]]:
        """The runs of the last complete measurement; none without one."""
        if not self._results.exists():
            return []
        return [run for line in self._results.read_text("utf-8").splitlines() if "cell" in (run := json.loads(line))]

    def measure(self, most_runs: int) -> None:
        """Make what is missing, run all cells in turns and keep the runs; those of before stay until all is done."""
        self._results.parent.mkdir(parents=True, exist_ok=True)
        for left_over in self.cache.root.glob("scratch-*"):  # of processes that were killed
            shutil.rmtree(left_over)
        self._prepare()
        engines = {session: self._start(session) for session in sorted({cell.session for cell in self.workload.cells})}
        partial = self._results.with_suffix(".part")
        try:
            with partial.open("w", encoding="utf-8") as file:
                for line in chain([_machine()], self._rounds(engines, most_runs)):
                    print(json.dumps(line), file=file, flush=True)
        finally:
            for engine in engines.values():
                engine.close()
        partial.rename(self._results)

    def _start(self, session: str) -> EngineProcess:
        engine, *options = SESSIONS[session]
        return EngineProcess([engine, *self._common, *options])

    def _prepare(self) -> None:
        names = {cell.training: self.trainings[cell.training] for cell in self.workload.cells}
        missing = [name for name, training in names.items() if not self.cache.is_ready(training)]
        if not missing:
            return
        # In a process of its own: those that are measured begin with an empty heap.
        builder = self._start("spark")
        try:
            for name in missing:
                _say(f"making the tables and the spine of {name} …")
                answer = builder.ask(do="prepare", training=name)
                if "error" in answer:
                    sys.exit(f"the tables of {name} could not be made: {answer['error']}")
        finally:
            builder.close()

    def _rounds(self, engines: dict[str, EngineProcess], most_runs: int) -> Iterator[dict[str, Any]]:
        """Round 0 warms up, with new Python workers; round 1 shows how often a cell is run."""
        last_round = dict.fromkeys(self.workload.cells, min(1, most_runs))
        quick: set[Cell] = set()
        for number in range(most_runs + 1):
            for cell in self.workload.cells:
                if number > last_round[cell]:
                    continue
                if number and cell in quick:
                    self._run(engines[cell.session], cell, number, renew=False)
                run = self._run(engines[cell.session], cell, number, renew=number == 0)
                if "error" in run:
                    last_round[cell] = 0
                elif number == 0 and run["seconds"] > _SLOW_SECONDS:
                    last_round[cell] = 0
                    yield {**run, "round": 1}
                elif number == 0 and run["seconds"] <= _QUICK_SECONDS:
                    quick.add(cell)
                    for _ in range(min(_WARM_UPS, most_runs)):
                        self._run(engines[cell.session], cell, number, renew=False)
                elif number == 1:
                    last_round[cell] = min(most_runs, _counted_runs(run["seconds"]))
                yield run

    def _run(self, engine: EngineProcess, cell: Cell, number: int, *, renew: bool) -> dict[str, Any]:
        answer = engine.ask(do="run", arm=cell.arm, training=cell.training, renew=renew)
        told = answer.get("error") or f"{answer['seconds']:.2f} s"
        _say(f"{self.workload.name} round {number} {cell.name}: {told}")
        if "sums" in answer:
            self._check(cell, self.trainings[cell.training], answer["sums"])
        return {"cell": cell.name, "round": number, **answer}

    def _check(self, cell: Cell, training: Training, sums: dict[str, float]) -> None:
        """All arms that give the same figures of a training set must agree on them, and no row may be missing."""
        assert sums.get("rows", training.spine_rows) == training.spine_rows, f"{cell.name} gives {sums['rows']} rows"
        expected = self._sums.setdefault((cell.training, *sorted(sums)), sums)
        wrong = {name: (sums[name], expected[name]) for name in sums if not _agree(sums[name], expected[name])}
        if wrong:
            sys.exit(f"{cell.name} does not agree with the arms before it (its sum, theirs): {wrong}")


def _agree(left: float | None, right: float | None) -> bool:
    """Whether two sums are the same but for rounding; a sum of no values is null in some engines and 0 in others."""
    return math.isclose(left or 0.0, right or 0.0, rel_tol=1e-9)


def _counted_runs(seconds: float) -> int:
    return next((runs for limit, runs in _RUNS_BY_SECONDS if seconds <= limit), 2)


def _machine() -> dict[str, Any]:
    packages: Sequence[tuple[str, str]] = [(name, version(name)) for name in _PACKAGES]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"at": now, "cores": os.cpu_count(), "python": platform.python_version(), **dict(packages)}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
