"""The as-of join once more, in the plainest Python: every spine row looks at every feature row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def naive_asof(
    spine: Sequence[Row],
    rows: Sequence[Row],
    on: Sequence[str],
    *,
    ttl_micros: int | None = None,
    known_at: bool = False,
) -> list[Row | None]:
    """For each spine row the feature row that the contract names, or None.

    Times are microseconds or None under ``event_timestamp`` and ``created_timestamp``; ``hash`` of a feature row is its
    row hash, the last tie-break.
    """
    return [_newest(row, [r for r in rows if _visible(row, r, on, ttl_micros, known_at)]) for row in spine]


def _visible(row: Row, feature: Row, on: Sequence[str], ttl_micros: int | None, known_at: bool) -> bool:
    t, event, created = row["event_timestamp"], feature["event_timestamp"], feature["created_timestamp"]
    if t is None or event is None or any(row[key] is None or row[key] != feature[key] for key in on):
        return False
    if known_at and (created is None or created > t):
        return False
    return bool(event <= t and (not ttl_micros or event >= t - ttl_micros))


def _newest(row: Row, visible: Sequence[Row]) -> Row | None:
    def rank(feature: Row) -> tuple[int, bool, int, int]:
        created = feature["created_timestamp"]
        return feature["event_timestamp"], created is not None, created or 0, feature["hash"]

    return max(visible, key=rank, default=None)
