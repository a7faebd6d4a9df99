"""The question the example asks, as SQL: one row per flight that left, an hour before its planned departure.

The columns are the join keys of ``departure_delay_v1``, ``event_timestamp`` (when the question is asked) and the label
``late`` (left more than 15 minutes behind plan). Cancelled flights have no such label and are left out. Times are
computed in seconds, so that the session's time zone plays no part.
"""

from pathlib import Path

LEAD_SECONDS = 3600


def spine(raw: Path) -> str:
    """The question over the raw flights in ``raw``. Delta takes only absolute paths in SQL, so it is made one."""
    return f"""
        SELECT carrier, flight, tailnum, origin, dest, make_date(year, month, day) AS departs_on,
               timestamp_seconds(unix_seconds(time_hour) + 60 * minute - {LEAD_SECONDS}) AS event_timestamp,
               dep_delay > 15 AS late
        FROM delta.`{raw.resolve() / "flights"}`
        WHERE dep_delay IS NOT NULL
    """
