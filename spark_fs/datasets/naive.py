"""A few rows of a training set joined again, by a loop that shares nothing with the join but the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import reduce
from operator import and_
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_fs.offline.compute import quoted, row_hash
from spark_fs.spec import ViewSpec


def differing(
    rows: Sequence[Mapping[str, Any]],
    features: DataFrame,
    view: ViewSpec,
    keys: Mapping[str, str],
    columns: Mapping[str, str],
    *,
    time: str,
    known_at: bool,
) -> list[str]:
    """The columns in which some of the rows do not hold what the rule gives, each once.

    ``rows`` are rows of a training set; ``features`` all rows of the view; ``keys`` gives for each key of the view the column
    of the training set, ``columns`` the same for features. One Spark job, which reads the history of the rows' entities.
    """
    asked = {tuple(row[column] for column in keys.values()) for row in rows}
    known = [key for key in asked if None not in key]
    if keys and not known:
        return [column for column in columns.values() if any(row[column] is not None for row in rows)]
    # By each key column alone: simple enough to be pushed down to the files. What fits only in part is never looked up below.
    chosen = [quoted(name).isin(list({key[place] for key in known})) for place, name in enumerate(keys)]
    wanted = features.where(reduce(and_, chosen, F.lit(True))).where(F.col("event_timestamp").isNotNull())
    micros = [F.unix_micros(name).alias(f"_{name}") for name in ("event_timestamp", "created_timestamp")]
    hashed = row_hash(view.feature_names).alias("_hash")
    history: dict[tuple[Any, ...], list[tuple[tuple[int, float, int], Any]]] = {}
    for found in wanted.select(*map(quoted, (*keys, *columns)), *micros, hashed).collect():
        created = found["_created_timestamp"]
        if known_at and created is None:
            continue
        order = (found["_event_timestamp"], float("-inf") if created is None else created, found["_hash"])
        history.setdefault(tuple(found[name] for name in keys), []).append((order, found))
    wrong: dict[str, None] = {}
    for row in rows:
        winner = _newest(history.get(tuple(row[column] for column in keys.values()), []), row[time], view.ttl, known_at)
        for name, column in columns.items():
            if repr(row[column]) != repr(None if winner is None else winner[name]):
                wrong[column] = None
    return list(wrong)


def _newest(rows: Sequence[tuple[tuple[int, float, int], Any]], t: int | None, ttl: timedelta | None, known_at: bool) -> Any:
    """The row with the greatest (event, created, hash) of those visible at ``t`` (microseconds since 1970), or None."""
    best = None
    for order, row in rows:
        event, created, _ = order
        visible = t is not None and event <= t and not (known_at and created > t)
        if visible and (best is None or order > best[0]):
            best = (order, row)
    if best is None or t is None:
        return None
    return None if ttl and t - best[0][0] > ttl // timedelta(microseconds=1) else best[1]
