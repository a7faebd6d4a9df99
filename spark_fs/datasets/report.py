"""Whether a training set leaks, and how good it is: counted while it is written, judged before it is committed.

What cannot be in a right join is a violation and fails the save. What may be meant, but spoils models when it is not, is a
warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import NumericType, StructType

from spark_fs.datasets.manifest import SPLIT
from spark_fs.errors import Problem
from spark_fs.offline.compute import quoted

#: A label that goes along with a feature so closely, or equals it so often, is most likely the feature itself.
SUSPICIOUS = 0.98
#: Nulls are counted part by part up to so many counts in all; beyond they would cost more than the join.
_MOST_COUNTS = 2_000
#: Ages are told to one in so many.
_ACCURACY = 10_000
_MICROS_A_SECOND = 1_000_000


@dataclass(frozen=True, slots=True)
class Trace:
    """One view of a join: the columns with its features, and those with the times of the rows that they were taken from.

    ``created`` is None for a view without created times.
    """

    alias: str
    features: tuple[str, ...]
    event: str
    created: str | None


def report_measures(
    schema: StructType, time: str, traces: Sequence[Trace], labels: Sequence[str] = (), parts: Sequence[str] = ()
) -> list[Column]:
    """Aggregates over the joined rows with their traced times, from which ``make_report`` makes the report."""
    measures = []
    for view, trace in enumerate(traces):
        lead = F.unix_micros(quoted(trace.event)) - F.unix_micros(quoted(time))
        measures += [
            F.count(quoted(trace.event)).alias(f"found_{view}"),
            F.max(lead).alias(f"lead_{view}"),
            F.min(lead).alias(f"oldest_{view}"),
            F.percentile_approx(-lead, [0.5, 0.99], _ACCURACY).alias(f"ages_{view}"),
        ]
        if trace.created is not None:
            measures.append(F.count_if(quoted(trace.created) > quoted(time)).alias(f"late_{view}"))
    for number, feature, part in _null_counts(traces, parts):
        measures.append(F.count_if(quoted(feature).isNull() & (F.col(SPLIT) == part)).alias(f"nulls_{number}_{part}"))
    for (n, label), (m, feature) in _pairs(schema, traces, labels):
        equal = quoted(label).cast("double") == quoted(feature).cast("double")
        both = quoted(label).isNotNull() & quoted(feature).isNotNull()
        measures.append(F.corr(quoted(label).cast("double"), quoted(feature).cast("double")).alias(f"corr_{n}_{m}"))
        measures.append((F.count_if(equal & both) / F.nullif(F.count_if(both), F.lit(0))).alias(f"equal_{n}_{m}"))
    return measures


def make_report(
    counts: Mapping[str, Any],
    schema: StructType,
    traces: Sequence[Trace],
    *,
    spine_rows: int,
    null_times: int,
    duplicates: int,
    labels: Sequence[str] = (),
    parts: Sequence[str] = (),
    compared: int = 0,
    differing: Sequence[str] = (),
) -> dict[str, Any]:
    """The report as JSON values, by what was counted (see ``report_measures``, ``content_measures``).

    ``compared`` rows were joined again by a naive path; ``differing`` names what came out otherwise.
    """
    rows = counts["rows"]
    by_part = {(feature, part): counts[f"nulls_{n}_{part}"] for n, feature, part in _null_counts(traces, parts)}
    at = {name: place for place, name in enumerate(schema.names)}
    views = {}
    for view, trace in enumerate(traces):
        found, ages = counts[f"found_{view}"], counts[f"ages_{view}"]
        views[trace.alias] = {
            "found": found,
            "found_share": _share(found, rows),
            "latest_event_after_t_seconds": _seconds(counts[f"lead_{view}"]),
            "age_seconds": ages
            and {
                "min": _seconds(-counts[f"lead_{view}"]),
                "median": _seconds(ages[0]),
                "p99": _seconds(ages[1]),
                "max": _seconds(-counts[f"oldest_{view}"]),
            },
            "not_yet_known": counts[f"late_{view}"] if trace.created else None,
            "not_yet_known_share": _share(counts[f"late_{view}"], found) if trace.created else None,
            "null_share": {feature: _share(counts[f"nulls_{at[feature]}"], rows) for feature in trace.features},
            "null_share_by_split": {
                feature: {part: _share(by_part[feature, part], counts[f"split_{n}"]) for n, part in enumerate(parts)}
                for feature in trace.features
                if (feature, next(iter(parts), "")) in by_part
            },
        }
    return {
        "rows_in": spine_rows,
        "rows_out": rows,
        "spine": {"null_times": null_times, "duplicates": duplicates},
        "views": views,
        "labels": {
            label: {
                feature: {"correlation": counts[f"corr_{n}_{m}"], "equal_share": counts[f"equal_{n}_{m}"]}
                for (n, other), (m, feature) in _pairs(schema, traces, labels)
                if other == label
            }
            for label in labels
        },
        "joined_again": {"rows": compared, "differing": list(differing)},
    }


def violations(report: Mapping[str, Any], *, known_at: bool) -> Iterator[Problem]:
    """What no right join can give."""
    code, mend = "SFS-517", "save again; if it stays so, report it as a bug of spark_fs"
    if report["rows_in"] != report["rows_out"]:
        what = (
            f"The entity DataFrame had {report['rows_in']:,} rows when it was counted, and {report['rows_out']:,} when joined."
        )
        yield Problem(code, what, "It gives other rows each time, such as by LIMIT or rand().", fix="write it to a table first")
    for alias, view in report["views"].items():
        if (view["latest_event_after_t_seconds"] or 0) > 0:
            yield Problem(code, f"View '{alias}' gave values from after a row's time.", fix=mend)
        if known_at and view["not_yet_known"]:
            yield Problem(code, f"View '{alias}' gave values that were not known at a row's time.", fix=mend)
    for name in report["joined_again"]["differing"]:
        yield Problem(code, f"Joined again by a plain loop, {name} has another value.", fix=mend)


def warnings(report: Mapping[str, Any], *, known_at: bool) -> Iterator[str]:
    """What is suspicious, one sentence each."""
    spine, rows = report["spine"], report["rows_out"]
    if spine["duplicates"]:
        yield f"{spine['duplicates']:,} of {rows:,} rows have the keys and the time of another one."
    if spine["null_times"]:
        yield f"{spine['null_times']:,} of {rows:,} rows have no time, and so no features."
    for alias, view in report["views"].items():
        if view["not_yet_known"] and not known_at:
            yield (
                f"View '{alias}': {view['not_yet_known_share']:.1%} of the values were not known yet at the row's time. "
                "A model will not have them then: join with known_at (--known-at)."
            )
        if rows and not view["found"]:
            yield f"View '{alias}' has no value for any row."
        else:
            yield from (f"Feature '{name}' is null in all rows." for name, share in view["null_share"].items() if share == 1)
    for label, features in report["labels"].items():
        for feature, found in features.items():
            if (found["equal_share"] or 0) >= SUSPICIOUS:
                yield f"Feature '{feature}' equals label '{label}' in {found['equal_share']:.1%} of the rows that have both."
            elif abs(found["correlation"] or 0) >= SUSPICIOUS:
                yield f"Feature '{feature}' goes along with label '{label}': correlation {found['correlation']:.3f}."


def _null_counts(traces: Sequence[Trace], parts: Sequence[str]) -> list[tuple[int, str, str]]:
    features = [name for trace in traces for name in trace.features]
    if len(features) * len(parts) > _MOST_COUNTS:
        return []
    return [(number, name, part) for number, name in enumerate(features) for part in parts]


def _pairs(schema: StructType, traces: Sequence[Trace], labels: Sequence[str]) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    """Each label with each feature, where both are numbers."""

    def numbers(names: Sequence[str]) -> list[tuple[int, str]]:
        return [(n, name) for n, name in enumerate(names) if isinstance(schema[name].dataType, NumericType)]

    features = [name for trace in traces for name in trace.features]
    return [(label, feature) for label in numbers(labels) for feature in numbers(features)]


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _seconds(micros: int | None) -> float | None:
    return None if micros is None else micros / _MICROS_A_SECOND
