"""What a materialization looks at, decided from the table's log and what is published already. No Spark."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from spark_fs.intervals import BEGINNING, Interval, intersect
from spark_fs.ledger import Published
from spark_fs.offline.table_log import Commit
from spark_fs.publication import Publication, plan_publication

MIDNIGHT = datetime(2024, 1, 1, tzinfo=timezone.utc)


def hours(first: int, past: int) -> Interval:
    return Interval(MIDNIGHT + timedelta(hours=first), MIDNIGHT + timedelta(hours=past))


def log(*builds: Interval | None) -> list[Commit]:
    """A log, newest first, of a table that was created as version 0; None is a commit of somebody else."""
    commits = [Commit(0, "CREATE TABLE", None)]
    commits += [Commit(n, "WRITE", None if interval is None else n, interval=interval) for n, interval in enumerate(builds, 1)]
    return commits[::-1]


def test_the_first_run_offers_its_interval():
    """Nothing is published yet, so there is nothing to compare with."""
    assert plan_publication(log(hours(0, 9)), None, hours(2, 4)) == Publication(1, (hours(2, 4),), (), None, (hours(2, 4),))


def test_only_what_was_not_published_is_offered_and_only_what_builds_touched_is_compared():
    """A run pays for what is new: the rest of its interval, and rebuilt parts of all that is published."""
    known = Published(1, (hours(0, 2), hours(4, 6)))
    found = plan_publication(log(hours(0, 9), hours(1, 5), hours(8, 9)), known, hours(1, 8))
    assert found == Publication(3, (hours(2, 4), hours(6, 8)), (hours(1, 2), hours(4, 5)), 1, (hours(0, 8),))


def test_a_run_after_which_nothing_has_changed_has_nothing_to_do():
    """The same interval again, or a part of it."""
    known = Published(1, (Interval(BEGINNING, hours(0, 9).end),))
    for interval in (hours(0, 9), hours(3, 4), *known.intervals):
        assert plan_publication(log(hours(0, 9)), known, interval) == Publication(1, (), (), 1, known.intervals)


def test_after_a_foreign_change_all_that_is_published_is_compared():
    """Which rows it touched the log does not tell."""
    known = Published(1, (hours(0, 2), hours(4, 6)))
    found = plan_publication(log(hours(0, 9), None), known, hours(0, 2))
    assert (found.fresh, found.compared) == ((), known.intervals)


def test_everything_is_offered_where_asked_for():
    """As after a loss of the online store: published or not."""
    known = Published(1, (hours(0, 2),))
    found = plan_publication(log(hours(0, 9), hours(1, 2)), known, hours(0, 3), everything=True)
    assert found == Publication(2, (hours(0, 3),), (hours(1, 2),), 1, (hours(0, 3),))


def test_what_two_sets_of_intervals_share():
    """Touching intervals share nothing, for their ends are left out."""
    assert intersect([hours(0, 3), hours(5, 9)], [hours(2, 6), hours(8, 9), hours(9, 12)]) == [
        hours(2, 3),
        hours(5, 6),
        hours(8, 9),
    ]
    assert intersect([hours(0, 3)], [hours(3, 5)]) == intersect([], [hours(0, 1)]) == []
