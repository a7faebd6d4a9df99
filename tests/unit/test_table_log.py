"""What the log of a feature table tells: which builds are new, and whether its files can be published as they lie."""

from __future__ import annotations

import pytest

from spark_fs.offline.tables import Commit, builds_since, can_be_read_in_place


def log(*operations: tuple[str, int | None], first: int = 0) -> list[Commit]:
    """A log, newest first, of commits given oldest first."""
    return [Commit(first + n, operation, build) for n, (operation, build) in enumerate(operations)][::-1]


CREATED = ("CREATE TABLE", None)


def test_the_builds_after_a_version_are_new():
    """Only commits after the version count, whatever the order in which their builds began."""
    commits = log(CREATED, ("WRITE", 1), ("WRITE", 3), ("WRITE", 2))
    assert builds_since(commits, 1) == {2, 3}
    assert builds_since(commits, 3) == set()


@pytest.mark.parametrize("operation", ["OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"])
def test_what_changes_no_row_is_not_new(operation):
    """Housekeeping gives nothing to publish."""
    assert builds_since(log(CREATED, ("WRITE", 1), (operation, None)), 1) == set()


def test_a_foreign_change_makes_everything_new():
    """Rows that somebody else wrote have no build of ours: the log cannot tell which they are."""
    assert builds_since(log(CREATED, ("WRITE", 1), ("DELETE", None)), 1) is None


def test_a_log_that_was_cleaned_up_cannot_tell():
    """Commits that are gone may have been builds."""
    assert builds_since(log(("WRITE", 8), ("WRITE", 9), first=8), 5) is None
    assert builds_since(log(("WRITE", 8), ("WRITE", 9), first=8), 7) == {8, 9}


def test_a_table_of_one_build_can_be_read_in_place():
    """One build writes each bucket once, in order."""
    assert can_be_read_in_place(log(CREATED, ("WRITE", 1)))
    assert can_be_read_in_place(log(CREATED, ("WRITE", 4), ("VACUUM END", None)))


@pytest.mark.parametrize(
    "commits",
    [
        log(CREATED),
        log(CREATED, ("WRITE", 1), ("WRITE", 2)),
        log(CREATED, ("WRITE", 1), ("OPTIMIZE", None)),
        log(CREATED, ("WRITE", 1), ("DELETE", None)),
        log(CREATED, ("WRITE", None)),
        log(("WRITE", 7), first=7),
    ],
    ids=["no build", "two builds", "compacted", "foreign change", "foreign write", "cleaned up"],
)
def test_any_other_table_cannot(commits):
    """Where a bucket may have two files, or a file two orders, Spark must find the newest rows."""
    assert not can_be_read_in_place(commits)
