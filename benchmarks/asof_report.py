"""Runs of bench_asof → figures: medians, ratios of runs of the same round, targets; as JSON lines and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.asof_workloads import Cell, Target, Workload
from benchmarks.report import Report

#: One run as it is kept: cell, round (0 warms up), seconds, sums, bytes; or an error.
Run = Mapping[str, Any]
_Values = Mapping[int, float]
#: What a run with new workers shows; later runs find them as large as an earlier one has left them.
_OF_ROUND_0 = ("worker_max_bytes", "workers_sum_bytes")


def report_workload(report: Report, workload: Workload, runs: Sequence[Run], *, judged: bool) -> str:
    """Print the figures as JSON lines and return the workload's Markdown. What is missing counts as a target missed."""
    lines = [f"### {workload.name}: {workload.title}", "", *_cell_table(workload, runs), ""]
    for cell in workload.cells:
        seconds = _values(runs, cell, "seconds")
        if seconds:
            report.figure(f"{workload.name}: {cell.name}", statistics.median(seconds.values()), "s", spread=_spread(seconds))
    lines += ["| figure | median | spread | target | met |", "|---|---|---|---|---|"]
    lines += [_target_row(report, workload, target, runs, judged=judged) for target in workload.targets]
    failed = {run["cell"]: run["error"] for run in runs if "error" in run}
    report.all_met = report.all_met and not failed
    lines += ["", *(f"{cell} failed: {error}" for cell, error in failed.items())] if failed else []
    return "\n".join([*lines, ""])


def _target_row(report: Report, workload: Workload, target: Target, runs: Sequence[Run], *, judged: bool) -> str:
    values = _values(runs, target.of, target.metric)
    if target.to is not None:
        others = _values(runs, target.to, target.metric)
        values = {number: value / others[number] for number, value in values.items() if others.get(number)}
    if not values:
        report.all_met = False
        return f"| {target.name} | not measured | | {target.bound} | no |"
    median, spread, unit = statistics.median(values.values()), _spread(values), "bytes" if target.to is None else "x"
    name = f"{workload.name}: {target.name}"
    bounds = {"at_least": target.at_least, "at_most": target.at_most}
    met = report.figure(name, median, unit, spread=spread, **bounds, judged=judged)
    verdict = "not judged" if met is None else "yes" if met else "no"
    return f"| {target.name} | {median:,.3g} | {spread[0]:,.3g}–{spread[1]:,.3g} | {target.bound} | {verdict} |"


def _values(runs: Iterable[Run], cell: Cell, metric: str) -> dict[int, float]:
    """What each counted run of the cell recorded, by round."""
    mine = [run for run in runs if run["cell"] == cell.name and metric in run]
    return {run["round"]: run[metric] for run in mine if (run["round"] == 0) == (metric in _OF_ROUND_0)}


def _spread(values: _Values) -> tuple[float, float]:
    return min(values.values()), max(values.values())


_HEAD = (
    "| arm | median, s | spread | runs | ratio | CPU, s | shuffled, MB | spilled, MB | heap, MB | JVM, MB "
    "| workers, MB | largest, MB | process, MB | files | read, MB |"
)


def _cell_table(workload: Workload, runs: Sequence[Run]) -> list[str]:
    first = _values(runs, workload.cells[0], "seconds")
    rows = [_cell_row(cell, runs, first) for cell in workload.cells]
    return [_HEAD, "|---" * (_HEAD.count("|") - 1) + "|", *rows]


def _cell_row(cell: Cell, runs: Sequence[Run], first: _Values) -> str:
    seconds = _values(runs, cell, "seconds")
    if not seconds:
        return f"| {cell.name} | not measured |" + " |" * (_HEAD.count("|") - 3)
    ratios = [value / first[number] for number, value in seconds.items() if number in first]
    low, high = _spread(seconds)
    cells = [cell.name, f"{statistics.median(seconds.values()):.2f}", f"{low:.2f}–{high:.2f}", str(len(seconds))]
    cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    worked = _values(runs, cell, "cpu_seconds")
    cells.append(f"{statistics.median(worked.values()):.2f}" if worked else "")
    of_jvm = ("shuffle_bytes", "spilled_bytes", "heap_peak_bytes", "jvm_bytes")
    of_workers = ("workers_sum_bytes", "worker_max_bytes")
    in_spark = "heap_peak_bytes" in next(run for run in runs if run["cell"] == cell.name and "seconds" in run)
    cells += [_megabytes(runs, cell, name) if in_spark else "" for name in (*of_jvm, *of_workers)]
    cells.append("" if in_spark else _megabytes(runs, cell, "process_bytes"))
    return f"| {' | '.join([*cells, *_files(runs, cell)])} |"


def _megabytes(runs: Sequence[Run], cell: Cell, metric: str) -> str:
    values = _values(runs, cell, metric)
    return f"{max(values.values()) / 1e6:,.0f}" if values else ""


def _files(runs: Sequence[Run], cell: Cell) -> tuple[str, str]:
    """Files and megabytes that the plan says it reads; empty where it does not say."""
    plans = [run["plan"] for run in runs if run["cell"] == cell.name and run.get("plan")]
    views = [view for group in (plans[-1]["groups"] if plans else ()) for view in group["views"]]
    if not views or not all(view.get("files") for view in views):
        return "", ""
    return f"{sum(view['files']['read'] for view in views):,}", f"{sum(view['bytes']['read'] for view in views) / 1e6:,.0f}"
