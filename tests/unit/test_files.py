"""Paths that can be opened without Spark, and which files of a table an interval concerns."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from urllib.parse import quote

import pytest

from spark_fs.files import check_readable, open_file
from spark_fs.intervals import BEGINNING, Interval, to_micros
from spark_fs.offline.layout import DataFile, Layout

NOON = datetime(2024, 7, 1, 12, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
AFTERNOON = Interval(NOON, NOON + HOUR)


def test_uris_that_only_hadoop_knows_are_told_apart(tmp_path):
    """hdfs:/x would be taken for a relative path; a colon further on is part of a name."""
    check_readable(str(tmp_path))
    check_readable(f"file://{tmp_path}")
    check_readable("/data/a:/b")
    for path in ("hdfs:/data", "s3a:/bucket/x", "nothing://x"):
        with pytest.raises(ValueError, match=r"two slashes|[Uu]nrecognized"):
            check_readable(path)


@pytest.mark.parametrize("prefix", ["", "file:", "file://"])
def test_a_local_file_is_opened_however_it_is_named(tmp_path, prefix):
    """Spark names files as URIs, with one slash or three, and with what stands in a name percent-encoded."""
    place = tmp_path / "a b%"
    place.write_bytes(b"rows")
    name = quote(str(place)) if prefix else str(place)
    with open_file(f"{prefix}{name}") as stream:
        assert stream.read() == b"rows"


def file(first: timedelta | None, last: timedelta | None) -> DataFile:
    def micros(offset: timedelta | None) -> int | None:
        return None if offset is None else to_micros(NOON + offset)

    return DataFile("f", 0, 1, 1, micros(first), micros(last))


MICRO = timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("first", "last", "overlaps", "within"),
    [
        (0 * HOUR, HOUR - MICRO, True, True),
        (0 * HOUR, HOUR, True, False),
        (-MICRO, HOUR - MICRO, True, False),
        (-HOUR, -MICRO, False, False),
        (HOUR, 2 * HOUR, False, False),
        (-HOUR, 2 * HOUR, True, False),
        (None, None, True, False),
        (None, -MICRO, False, False),
        (HOUR, None, False, False),
    ],
)
def test_a_file_is_concerned_where_it_may_hold_a_row_of_the_interval(first, last, overlaps, within):
    """The interval's end is left out; a bound that is not known excludes nothing and proves nothing."""
    found = file(first, last)
    assert (found.may_overlap(AFTERNOON), found.lies_within(AFTERNOON)) == (overlaps, within)
    assert Layout(1, (found,)).touching(AFTERNOON) == ((found,) if overlaps else ())


def test_an_interval_from_the_beginning_has_no_lower_bound():
    """Whatever is before its end lies in it."""
    assert file(-9000 * 24 * HOUR, -MICRO).lies_within(Interval(BEGINNING, NOON))
