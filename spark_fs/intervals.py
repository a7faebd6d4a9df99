"""Half-open UTC intervals ``[start, end)`` and their arithmetic; pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

UTC = timezone.utc
#: The instant before all data: an interval starting here says that nothing older is left out.
BEGINNING = datetime(1, 1, 1, tzinfo=UTC)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """The instants from ``start`` (inclusive) to ``end`` (exclusive), both in UTC; never empty."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise ValueError("an interval needs instants with a time zone")
        if self.start >= self.end:
            raise ValueError(f"the start {text(self.start)} must lie before the end {text(self.end)}")

    def __str__(self) -> str:
        return f"[{text(self.start)}, {text(self.end)})"


def parse_instant(value: str) -> datetime:
    """An instant from ISO 8601 text; text without a zone means UTC. ValueError names the text."""
    try:
        instant = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"'{value}' is no ISO 8601 date or time, such as 2013-07-01 or 2013-07-01T12:00:00Z") from None


def text(instant: datetime) -> str:
    """The instant as ISO 8601 UTC text, with microseconds only where they are not zero; ``beginning`` for BEGINNING."""
    if instant == BEGINNING:
        return "beginning"
    utc = instant.astimezone(UTC).replace(tzinfo=None)
    return utc.isoformat(timespec="microseconds" if utc.microsecond else "seconds") + "Z"


def from_text(value: str) -> datetime:
    """The instant that ``text`` has written."""
    return BEGINNING if value == text(BEGINNING) else parse_instant(value)


def to_micros(instant: datetime) -> int:
    """Microseconds since 1970-01-01 UTC; exact, negative before it."""
    return (instant - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The UTC instant so many microseconds after 1970-01-01."""
    return _EPOCH + timedelta(microseconds=micros)


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same instants as sorted intervals that neither overlap nor touch."""
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and interval.start <= merged[-1].end:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, interval.end))
        else:
            merged.append(interval)
    return merged


def missing(wanted: Interval, done: Sequence[Interval]) -> list[Interval]:
    """What of ``wanted`` no interval of ``done`` covers, in order."""
    gaps, cursor = [], wanted.start
    for interval in merge(done):
        if interval.end <= cursor or interval.start >= wanted.end:
            continue
        if interval.start > cursor:
            gaps.append(Interval(cursor, interval.start))
        cursor = interval.end
    if cursor < wanted.end:
        gaps.append(Interval(cursor, wanted.end))
    return gaps


def covers(done: Sequence[Interval], wanted: Interval) -> bool:
    """Whether every instant of ``wanted`` lies in an interval of ``done``."""
    return not missing(wanted, done)


def intersect(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """The instants that lie in an interval of both, merged."""
    pairs = ((max(a.start, b.start), min(a.end, b.end)) for a in left for b in right)
    return merge(Interval(start, end) for start, end in pairs if start < end)
