"""Interval arithmetic against a model that is too simple to be wrong: sets of microseconds."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fs.intervals import BEGINNING, Interval, covers, from_micros, merge, missing, parse_instant, text, to_micros

UTC = timezone.utc
ZERO = datetime(2013, 7, 1, tzinfo=UTC)


def at(tick: int) -> datetime:
    return ZERO + timedelta(microseconds=tick)


def ticks(intervals) -> set[int]:
    """The model: the microseconds inside the intervals."""
    return {
        tick for i in intervals for tick in range(*((bound - ZERO) // timedelta(microseconds=1) for bound in (i.start, i.end)))
    }


intervals = st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda pair: Interval(at(pair[0]), at(pair[0] + pair[1])))
zones = st.sampled_from([ZoneInfo(name) for name in ("UTC", "America/New_York", "Asia/Kathmandu", "Pacific/Kiritimati")])
instants = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=zones)  # noqa: DTZ001  # hypothesis adds the zone


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(intervals, max_size=8))
def test_merge_keeps_the_instants_and_leaves_neither_overlap_nor_touch(given_intervals):
    """The result is the smallest sorted list with the same instants."""
    merged = merge(given_intervals)
    assert ticks(merged) == ticks(given_intervals)
    assert all(before.end < after.start for before, after in pairwise(merged))


@settings(deadline=None)  # a busy machine is no failure
@given(intervals, st.lists(intervals, max_size=8))
def test_missing_is_the_difference_of_sets(wanted, done):
    """In order, without overlap, never outside of what is wanted."""
    gaps = missing(wanted, done)
    assert ticks(gaps) == ticks([wanted]) - ticks(done)
    assert gaps == merge(gaps)


@settings(deadline=None)  # a busy machine is no failure
@given(intervals, st.lists(intervals, max_size=8))
def test_covers_is_inclusion_of_sets(wanted, done):
    """Covered is what leaves nothing missing."""
    assert covers(done, wanted) == (ticks([wanted]) <= ticks(done))


@settings(deadline=None)  # a busy machine is no failure
@given(intervals, st.lists(intervals, max_size=8))
def test_doing_what_is_missing_leaves_nothing_missing(wanted, done):
    """So a build that ends makes the next one find nothing to do."""
    assert missing(wanted, [*done, *missing(wanted, done)]) == []


def test_intervals_that_touch_are_one_and_a_microsecond_apart_are_two():
    """The end is exclusive, so the end of one is the start of the next."""
    assert merge([Interval(at(1), at(2)), Interval(at(0), at(1))]) == [Interval(at(0), at(2))]
    assert len(merge([Interval(at(0), at(1)), Interval(at(2), at(3))])) == 2


@pytest.mark.parametrize("end", [at(5), at(4)])
def test_an_empty_or_reversed_interval_is_refused(end):
    """It would mean nothing; the error shows both bounds."""
    with pytest.raises(ValueError, match="must lie before the end"):
        Interval(at(5), end)


def test_an_interval_without_zone_is_refused():
    """There is no telling which instants are meant."""
    with pytest.raises(ValueError, match="time zone"):
        Interval(at(0).replace(tzinfo=None), at(5))
    with pytest.raises(ValueError, match="time zone"):
        Interval(at(0), at(5).replace(tzinfo=None))


def test_an_interval_reads_as_half_open():
    """As printed in tables and messages."""
    assert str(Interval(BEGINNING, at(1))) == "[beginning, 2013-07-01T00:00:00.000001Z)"


@settings(deadline=None)  # a busy machine is no failure
@given(instants)
def test_the_text_of_an_instant_reads_back_exactly(instant):
    """To the microsecond, from any time zone, hours shown twice included."""
    assert parse_instant(text(instant)) == instant.astimezone(UTC)


@settings(deadline=None)  # a busy machine is no failure
@given(instants)
def test_microseconds_read_back_exactly(instant):
    """Also before 1970, and far beyond what a double holds."""
    assert from_micros(to_micros(instant)) == instant.astimezone(UTC)


@settings(deadline=None)  # a busy machine is no failure
@given(instants, instants)
def test_microseconds_keep_the_order_of_instants(one, other):
    """The codec and the build compare them as numbers; zones play no part."""
    assert (to_micros(one) < to_micros(other)) == (one.astimezone(UTC) < other.astimezone(UTC))


def test_microseconds_count_from_1970_and_are_negative_before():
    """The epoch is zero; the microsecond before it is -1."""
    assert to_micros(datetime(1970, 1, 1, tzinfo=UTC)) == 0
    assert to_micros(datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)) == -1


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2013-07-01", datetime(2013, 7, 1, tzinfo=UTC)),
        (" 2013-07-01T12:00 ", datetime(2013, 7, 1, 12, tzinfo=UTC)),
        ("2013-07-01T12:00:00Z", datetime(2013, 7, 1, 12, tzinfo=UTC)),
        ("2013-07-01T12:00:00+02:00", datetime(2013, 7, 1, 10, tzinfo=UTC)),
        ("2013-07-01T12:00:00.000001", datetime(2013, 7, 1, 12, 0, 0, 1, tzinfo=UTC)),
    ],
)
def test_an_instant_without_zone_is_utc(written, meant):
    """And one with a zone is brought to UTC."""
    instant = parse_instant(written)
    assert instant == meant
    assert instant.tzinfo is UTC


@pytest.mark.parametrize("written", ["", "yesterday", "2013-02-30", "01/07/2013", "2013-07-01T25:00"])
def test_text_that_is_no_instant_is_refused_by_name(written):
    """With an example of what is."""
    with pytest.raises(ValueError, match=f"'{written}' is no ISO 8601 date or time, such as 2013-07-01"):
        parse_instant(written)


@pytest.mark.parametrize("written", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:00:00-05:00"])
def test_an_instant_outside_the_calendar_is_refused_like_any_other_text(written):
    """In UTC it would lie before year 1 or after year 9999."""
    with pytest.raises(ValueError, match="ISO 8601"):
        parse_instant(written)
