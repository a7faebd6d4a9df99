"""What people and schedulers are shown of a run that did not finish: what is done, what failed, what is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spark_fs import console
from spark_fs.errors import ExitCode, InterruptedRunError, InvalidError, PartlyDoneError, Problem, SparkFSError

DONE = [{"view": "a@1", "applied": 3}]
LEFT = [
    {"view": "b@1", "state": "failed", "buckets_done": 5, "buckets_left": 11, "error": "SFS-603"},
    {"view": "c@1", "state": "left", "buckets_done": None, "buckets_left": None, "error": None},
]


def unfinished(error: SparkFSError) -> SparkFSError:
    error.unfinished = LEFT
    return error


def told(error: BaseException, output: str) -> tuple[int, list[Any]]:
    """The exit code of a command over views that ends by the error, and what it reported."""
    found: list[Any] = []

    def act() -> ExitCode:
        def views() -> list[Any]:
            raise error

        results, stopped = console.results_of(views)
        found.extend(results)
        console.report(results, stopped, output, title="Materialized")
        return ExitCode.OK

    return console.run(act), found


@pytest.mark.parametrize(
    ("error", "code", "results"),
    [
        (unfinished(PartlyDoneError(Problem("SFS-603", "Full."), results=DONE)), ExitCode.PARTLY_DONE, DONE),
        (unfinished(InvalidError.of("SFS-608", "Too long.")), ExitCode.INVALID, []),
        (unfinished(SparkFSError.of("SFS-603", "Full.")), ExitCode.FAILED, []),
        (InterruptedRunError(DONE, LEFT), ExitCode.INTERRUPTED, DONE),
    ],
)
def test_a_run_that_did_not_finish_shows_what_is_done_and_what_is_left(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: ExitCode, results: list[Any]
) -> None:
    """Two tables, or one list in JSON; the exit code is that of the error."""
    assert told(error, "table") == (code, results)
    shown = capsys.readouterr()
    assert ("Materialized" in shown.out) == bool(results)
    assert "Not finished" in shown.out
    assert [line.split() for line in shown.out.splitlines() if "@1" in line][-2:] == [
        ["b@1", "failed", "5", "11", "SFS-603"],
        ["c@1", "left", "–", "–", "–"],
    ]
    assert told(error, "json") == (code, results)
    assert json.loads(capsys.readouterr().out) == [*results, *LEFT]


def test_a_run_that_finished_shows_its_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    """And one without results says so."""
    assert console.results_of(lambda: DONE) == (DONE, None)
    console.report(DONE, None, "table", title="Materialized")
    console.report([], None, "table", title="Materialized", empty="Nothing was published yet.")
    shown = capsys.readouterr()
    assert "Not finished" not in shown.out
    assert "a@1" in shown.out
    assert "Nothing was published yet." in shown.err
