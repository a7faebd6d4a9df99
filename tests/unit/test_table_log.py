"""What the log of a feature table tells: which builds are new, whether files can be read as they lie, what to rewrite."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from spark_fs.build import choose_buckets, plan_rewrite
from spark_fs.intervals import BEGINNING, Interval
from spark_fs.offline.table_log import Commit, Rewrite, can_be_read_in_place, changed_since, files_are_sorted, parse_commit


def log(*operations: tuple, first: int = 0) -> list[Commit]:
    """A log, newest first, of commits given oldest first, each as (operation, build, whether in order, rewrite).

    Build n is of the interval ``hours(n)``.
    """
    commits = [Commit(first + n, *fields) for n, fields in enumerate(operations)][::-1]
    return [replace(commit, interval=hours(commit.build) if commit.build else None) for commit in commits]


def hours(first: int, past: int | None = None) -> Interval:
    begin = datetime(2024, 1, 1, tzinfo=timezone.utc)
    return Interval(begin + timedelta(hours=first), begin + timedelta(hours=past or first + 1))


CREATED, COMPACTED, VACUUMED = ("CREATE TABLE", None), ("OPTIMIZE", None), ("VACUUM END", None)


def built(number: int, *, in_order: bool = True) -> tuple:
    return ("WRITE", number, in_order)


def rewritten(read_version: int) -> tuple:
    return ("WRITE", None, True, Rewrite(read_version, 4, (0, 1)))


def test_the_intervals_of_builds_after_a_version_are_new():
    """Only commits after the version count, whatever the order in which their builds began."""
    commits = log(CREATED, ("WRITE", 1), ("WRITE", 4), ("WRITE", 2))
    assert changed_since(commits, 1) == [hours(2), hours(4)]
    assert changed_since(commits, 0) == [hours(1, 3), hours(4)]
    assert changed_since(commits, 3) == []


@pytest.mark.parametrize("operation", ["OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES"])
def test_what_changes_no_row_is_not_new(operation):
    """Housekeeping gives nothing to publish."""
    assert changed_since(log(CREATED, ("WRITE", 1), (operation, None)), 1) == []


def test_a_foreign_change_may_be_anywhere():
    """The log does not tell which rows somebody else wrote."""
    assert changed_since(log(CREATED, ("WRITE", 1), ("DELETE", None)), 1) is None


def test_a_log_that_was_cleaned_up_cannot_tell():
    """Commits that are gone may have been builds; nor can the log of a table that was made anew."""
    assert changed_since(log(("WRITE", 8), ("WRITE", 9), first=8), 5) is None
    assert changed_since(log(("WRITE", 8), ("WRITE", 9), first=8), 7) == [hours(8, 10)]
    assert changed_since(log(CREATED, ("WRITE", 1)), 7) is None


def test_a_build_tells_its_interval():
    """As it was noted with the commit, from the beginning on too."""
    note = {"view": "v@1", "build": 3, "interval": ["beginning", "2024-01-01T00:00:00.000001Z"], "in_order": True}
    commit = parse_commit(5, "WRITE", None, json.dumps(note))
    assert commit.interval == Interval(BEGINNING, datetime(2024, 1, 1, microsecond=1, tzinfo=timezone.utc))
    assert (commit.build, commit.in_order) == (3, True)


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
        log(CREATED, built(1), built(2), rewritten(2), built(3)),
        log(CREATED, built(1), built(2), built(3), rewritten(2)),
        log(CREATED, built(1), built(2), rewritten(2), COMPACTED),
        log(built(8), rewritten(6), first=8),
    ],
    ids=[
        "no build",
        "two builds",
        "compacted",
        "foreign change",
        "foreign write",
        "cleaned up",
        "build after upkeep",
        "build beside upkeep",
        "compacted after upkeep",
        "cleaned up to upkeep",
    ],
)
def test_any_other_table_cannot(commits):
    """Where a bucket may have two files, or a file two orders, Spark must find the newest rows."""
    assert not can_be_read_in_place(commits)


def test_a_table_can_be_read_in_place_after_an_upkeep():
    """It leaves one sorted file a bucket, whatever was before and however far the log was cleaned up before it."""
    assert can_be_read_in_place(log(CREATED, built(1), built(2), rewritten(2)))
    assert can_be_read_in_place(log(CREATED, built(1), COMPACTED, ("DELETE", None), rewritten(3), VACUUMED))
    assert can_be_read_in_place(log(rewritten(6), VACUUMED, first=7))


def test_an_upkeep_gives_nothing_to_publish():
    """It moves rows and changes none; the builds around it count as ever."""
    commits = log(CREATED, built(1), built(2), rewritten(1), built(3))
    assert changed_since(commits, 2) == [hours(3)]
    assert changed_since(commits[1:], 2) == []


@pytest.mark.parametrize(
    ("commits", "known"),
    [
        (log(CREATED, built(1), built(2)), True),
        (log(CREATED, built(1), built(2, in_order=False)), False),
        (log(CREATED, built(1), COMPACTED), False),
        (log(CREATED, built(1), ("DELETE", None)), False),
        (log(built(8), built(9), first=8), False),
        (log(CREATED, COMPACTED, rewritten(1), built(2), VACUUMED), True),
        (log(CREATED, built(1), COMPACTED, rewritten(1)), False),
        (log(CREATED, built(1), rewritten(1), rewritten(1)), True),
        (log(rewritten(7), built(9), first=8), True),
        (log(built(8), rewritten(6), first=8), False),
    ],
    ids=[
        "builds", "one not in order", "compacted", "foreign change", "cleaned up", "upkeep, then a build",
        "compacted beside upkeep", "two upkeeps", "cleaned up before the upkeep", "cleaned up since the upkeep began",
    ],
)  # fmt: skip
def test_files_are_sorted_if_only_builds_and_upkeep_wrote_them(commits, known):
    """Builds write sorted files, unless they take over rows of older ones; others write as they like."""
    assert files_are_sorted(commits) is known


# What an upkeep does.


def test_buckets_with_several_files_are_rewritten():
    """Those and no others."""
    plan = plan_rewrite(log(CREATED, built(1), built(2)), {0: 2, 1: 1, 3: 7}, 4)
    assert plan.rewrite == Rewrite(2, 4, (0, 3))
    assert plan.reason == "2 of 4 buckets: 2 with several files"


def test_all_buckets_are_rewritten_where_files_may_be_unsorted():
    """The log does not tell which files a foreign commit wrote."""
    plan = plan_rewrite(log(CREATED, built(1), COMPACTED), {0: 1, 1: 2}, 4)
    assert plan.rewrite == Rewrite(2, 4, (0, 1))
    assert plan.reason == "2 of 4 buckets: 1 with several files, the others perhaps unsorted"


@pytest.mark.parametrize("wanted", [None, 4])
def test_one_sorted_file_a_bucket_is_left_alone(wanted):
    """There is nothing to do; nor in a table without files."""
    assert plan_rewrite(log(CREATED, built(1)), {0: 1, 1: 1}, 4, wanted).rewrite is None
    assert plan_rewrite(log(CREATED, COMPACTED), {}, 4, wanted).rewrite is None


def test_another_number_of_buckets_moves_all_rows():
    """Also those of buckets that are in order."""
    plan = plan_rewrite(log(CREATED, built(1)), {0: 1, 1: 1}, 4, 2)
    assert (plan.rewrite, plan.reason) == (Rewrite(1, 2, (0, 1)), "from 4 to 2 buckets")


MB = 2**20


@pytest.mark.parametrize(
    ("source_bytes", "buckets"),
    [
        (None, 16),
        (0, 8),
        (512 * MB, 8),
        (512 * MB + 1, 16),
        (1024 * MB, 16),
        (1025 * MB, 32),
        (65_536 * MB, 1024),
        (10**15, 1024),
    ],
)
def test_the_first_number_of_buckets_follows_the_size_of_the_source(source_bytes, buckets):
    """The smallest power of two from 8 to 1024 with at most 64 MB of the source in a bucket; 16 where nobody knows."""
    assert choose_buckets(source_bytes) == buckets
