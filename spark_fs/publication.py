"""What a run has to publish of a view, decided from the table's log and from what is published already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spark_fs.intervals import Interval, from_micros, intersect, merge, missing, to_micros
from spark_fs.ledger import Published
from spark_fs.offline.table_log import Commit, changed_since


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: to publish an interval, and how (see ``materialize_view``)."""

    interval: Interval
    restate: bool = False
    everything: bool = False
    repair: bool = False
    full: bool = False

    def to_json(self) -> dict[str, Any]:
        """The request as JSON values."""
        how = {name: getattr(self, name) for name in ("restate", "everything", "repair", "full")}
        return {"interval": _pair(self.interval), **how}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Request:
        """The request that ``to_json`` has given."""
        how = {name: body[name] for name in ("restate", "everything", "repair", "full")}
        return cls(_interval(body["interval"]), **how)


@dataclass(frozen=True, slots=True)
class Publication:
    """What a run has to look at, in the table at ``version``.

    Of event times in ``fresh`` every row is offered. Of those in ``compared`` rows are compared with what they were at
    version ``since``. Afterwards all of ``intervals`` is published.
    """

    version: int
    fresh: tuple[Interval, ...]
    compared: tuple[Interval, ...]
    since: int | None
    intervals: tuple[Interval, ...]

    @property
    def touched(self) -> tuple[Interval, ...]:
        """Event times of which rows are written, perhaps."""
        return tuple(merge([*self.fresh, *self.compared]))

    def to_json(self) -> dict[str, Any]:
        """The publication as JSON values."""
        names = ("fresh", "compared", "intervals")
        pairs = {name: [_pair(interval) for interval in getattr(self, name)] for name in names}
        return {"version": self.version, "since": self.since, **pairs}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Publication:
        """The publication that ``to_json`` has given."""
        fresh, compared, intervals = (tuple(map(_interval, body[name])) for name in ("fresh", "compared", "intervals"))
        return cls(body["version"], fresh, compared, body["since"], intervals)


def plan_publication(
    log: Sequence[Commit],
    known: Published | None,
    interval: Interval,
    *,
    everything: bool = False,
    repair: bool = False,
    full: bool = False,
) -> Publication:
    """What is to be published for ``interval``, by the table's log (newest first) and what is published already.

    ``everything``: also what was published of it before; ``repair``: all that was published before; ``full``: that and the
    interval, where nothing of it is yet.
    """
    version = log[0].version
    if known is None:
        return Publication(version, (interval,), (), None, (interval,))
    if full:
        whole = tuple(merge([*known.intervals, interval]))
        return Publication(version, whole, (), None, whole)
    changed = changed_since(log, known.table_version)
    compared = known.intervals if changed is None else tuple(intersect(known.intervals, changed))
    if repair:
        return Publication(version, known.intervals, compared, known.table_version, known.intervals)
    fresh = (interval,) if everything else tuple(missing(interval, known.intervals))
    return Publication(version, fresh, compared, known.table_version, tuple(merge([*known.intervals, interval])))


def _pair(interval: Interval) -> list[int]:
    return [to_micros(interval.start), to_micros(interval.end)]


def _interval(pair: Sequence[int]) -> Interval:
    return Interval(*map(from_micros, pair))
