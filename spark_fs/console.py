"""What people and schedulers see of a command: tables or JSON on stdout, progress and errors on stderr, an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from spark_fs.errors import ExitCode, InterruptedRunError, PartlyDoneError, SparkFSError, translate

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

#: Names the file that takes a job's results in place of stdout; set by ``submit.SubmitCommand.run_job``.
RESULTS_VARIABLE = "SPARK_FS_RESULTS"

_POLL_SECONDS = 0.5


def _show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))  # noqa: T201  # results go to stdout


def show(rows: Sequence[Mapping[str, Any]], output: str, *, title: str = "", empty: str = "Nothing to show.") -> None:
    """Print rows on stdout: as one JSON document, or as a table with the first row's keys as columns."""
    if output == "json":
        _show_json(list(rows))
        return
    if not rows:
        say(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in rows[0]:
        numeric = all(isinstance(row[column], int | float) for row in rows if row[column] is not None)
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    # Piped into a file there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " → ".join(str(item) for item in value)
    return str(value)


def show_manifest(manifest: Mapping[str, Any], output: str, examples: Sequence[Mapping[str, Any]] = ()) -> None:
    """Print a dataset's manifest as JSON, or as a summary and its columns, beside the values of a few example rows."""
    if output == "json":
        _show_json(manifest)
        return
    summary = {name: manifest[name] for name in ("name", "version", "rows", "checksum", "path", "delta_version")}
    if split := manifest["split"]:
        summary |= {f"rows of {part}": rows for part, rows in split["rows"].items()}
    show([{"dataset": name, "value": str(value)} for name, value in summary.items()], output)
    rows = max(manifest["rows"], 1)
    columns = [
        {
            "column": column["name"],
            "type": column["type"],
            "role": column["role"],
            "nulls": f"{column['nulls'] / rows:.1%}",
            **{f"row {n}": str(row[column["name"]]) for n, row in enumerate(examples, 1)},
        }
        for column in manifest["columns"]
    ]
    show(columns, output)
    for warning in manifest["report"]["warnings"]:
        say(f"Warning: {warning}")


def show_verdict(verdict: Mapping[str, Any], output: str) -> None:
    """Print what was found of a dataset: as JSON, or what was compared, then what stands in the way of joining it again."""
    if output == "json":
        _show_json(verdict)
        return
    listed = ("obstacles", "notes")
    show([{"dataset": name, "value": str(value)} for name, value in verdict.items() if name not in listed], output)
    for obstacle in verdict["obstacles"]:
        say(f"Not joined again: {obstacle}.")
    for note in verdict["notes"]:
        say(f"Note: {note}.")


def show_diff(diff: Mapping[str, Any], output: str) -> None:
    """Print what two versions of a dataset have otherwise: as JSON, or what the manifests say, then rows, then columns."""
    if output == "json":
        _show_json(diff)
        return
    old, new = diff["old"], diff["new"]
    changed = [{"what": what, old: str(of["old"]), new: str(of["new"])} for what, of in diff["manifest"].items()]
    show(changed, output, empty=f"{old} and {new} were asked for alike, of the same versions.")
    show([diff["rows"]], output, title="Rows")
    show([{"column": name, **of} for name, of in diff["columns"].items()], output, title="Columns of rows that both have")


def say(text: str) -> None:
    """One line for the person, on stderr."""
    print(text, file=sys.stderr)  # noqa: T201  # the one place that talks


def run(act: Callable[[], ExitCode | None], *, debug: bool = False) -> int:
    """Do something for a command and return its exit code; errors are printed on stderr, with traces only for ``debug``."""
    try:
        with _stopped_by_sigterm(), _results():
            return int(act() or ExitCode.OK)
    except KeyboardInterrupt as stop:
        say("Interrupted; what was finished is kept, and the same command resumes.")
        # A run over several views has told in its own error what it did, and comes from the signal's.
        by_sigterm = isinstance(stop, Terminated) or isinstance(stop.__cause__, Terminated)
        return ExitCode.TERMINATED if by_sigterm else ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the last stop: whatever it is becomes a message and a code
        ours = translate(error)
        if ours is None or debug:
            import traceback

            traceback.print_exception(error)
        if ours is None:
            ours = SparkFSError.of("SFS-700", "Something failed that should not.", why=f"{type(error).__name__}.")
        say(str(ours))
        return int(ours.exit_code)


class Terminated(KeyboardInterrupt):
    """Somebody has sent SIGTERM, as schedulers do; ends a command as Ctrl-C does."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _results() -> Iterator[None]:
    """Results go to stdout, or to the file that the caller of a job wants them in."""
    path = os.environ.get(RESULTS_VARIABLE)
    if path is None:
        yield
        return
    with open(path, "w", encoding="utf-8") as file, redirect_stdout(file):
        yield


def results_of(act: Callable[[], Sequence[Any]]) -> tuple[list[Any], BaseException | None]:
    """The results of an act over several views, and what stopped it before all were finished."""
    try:
        return list(act()), None
    except (PartlyDoneError, InterruptedRunError) as error:
        return list(error.results), error
    except SparkFSError as error:
        if not error.unfinished:
            raise
        return [], error


def report(
    rows: Sequence[Mapping[str, Any]], error: BaseException | None, output: str, *, title: str, empty: str = "Nothing to show."
) -> None:
    """Show the rows of what has finished, then what has not, as a second table (in JSON as more rows); raises the error."""
    unfinished: Sequence[Mapping[str, Any]] = getattr(error, "unfinished", ())
    if output == "json":
        show([*rows, *unfinished], output)
    elif rows or not error:
        show(rows, output, title=title, empty=empty)
    if unfinished and output != "json":
        show(unfinished, output, title="Not finished")
    if error:
        raise error


@contextmanager
def progress(spark: SparkSession) -> Iterator[None]:
    """Show Spark's stages on stderr while the block runs: a moving bar on a terminal, one line per stage otherwise."""
    done = threading.Event()
    watch = _watch_terminal if sys.stderr.isatty() else _watch_lines
    thread = threading.Thread(target=watch, args=(spark, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


def _stages(spark: SparkSession) -> Iterator[tuple[int, str, int, int]]:
    """The running stages: id, name, tasks, finished tasks."""
    tracker = spark.sparkContext.statusTracker()
    for stage_id in tracker.getActiveStageIds():
        info = tracker.getStageInfo(stage_id)
        if info is not None:
            # Delta's own stages carry the names of Scala's closures.
            name = "Delta log" if info.name.startswith("$anonfun") else info.name.split(" at ")[0]
            yield stage_id, name, info.numTasks, info.numCompletedTasks


def _watch_lines(spark: SparkSession, done: threading.Event) -> None:
    seen: set[int] = set()
    while not done.wait(_POLL_SECONDS):
        for stage_id, name, tasks, _ in _stages(spark):
            if stage_id not in seen:
                seen.add(stage_id)
                say(f"stage {stage_id}: {name}, {tasks} tasks")


def _watch_terminal(spark: SparkSession, done: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        shown: dict[int, Any] = {}
        while not done.wait(_POLL_SECONDS):
            running = {stage_id: (name, tasks, finished) for stage_id, name, tasks, finished in _stages(spark)}
            for stage_id in [known for known in shown if known not in running]:
                bars.remove_task(shown.pop(stage_id))
            for stage_id, (name, tasks, finished) in running.items():
                if stage_id not in shown:
                    shown[stage_id] = bars.add_task(f"stage {stage_id}: {name}", total=tasks)
                bars.update(shown[stage_id], completed=finished)
