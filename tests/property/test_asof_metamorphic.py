"""Rules that tie two as-of joins together: what about the input may change without changing the result, what not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from spark_fs.offline.asof import AsofView, asof_join, execute, plan_asof, spine_stats
from tests.asof_contract import (
    HOUR,
    RULES,
    SEED,
    VALUES,
    ZONES,
    Rows,
    Rule,
    feature_frame,
    joined_values,
    random_cases,
    spine_frame,
)

COUNT = 80
PLAIN = Rule(("case", "a", "b"))
TTL = Rule(("case", "a"), ttl_micros=HOUR)
KNOWN = Rule(("case", "a"), ttl_micros=HOUR, known_at=True)
ALL = pytest.mark.parametrize("rule", [PLAIN, TTL, KNOWN], ids=["plain", "ttl", "known_at"])

Values = dict[int, list[tuple[Any, ...]]]


def join(spine: DataFrame, features: DataFrame, rule: Rule) -> Values:
    return joined_values(asof_join(spine, features, **rule.arguments, prefix="f_"), [f"f_{name}" for name in VALUES])


@pytest.fixture(scope="module")
def cases() -> tuple[Rows, Rows]:
    return random_cases(SEED, COUNT)


@pytest.fixture(scope="module")
def alone(cases: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    """The same, but every spine row with a time has its own copy of its feature rows, which can be changed alone."""
    spine, rows = cases
    timed = [{**row, "case": number} for number, row in enumerate(spine) if row["event_timestamp"] is not None]
    return timed, [{**row, "case": own["case"]} for own in timed for row in rows if row["case"] == spine[own["case"]]["case"]]


@contextmanager
def settings(spark: SparkSession, **values: str) -> Iterator[None]:
    names = {name: "spark.sql." + name.replace("__", ".") for name in values}
    before = {name: spark.conf.get(key) for name, key in names.items()}
    for name, value in values.items():
        spark.conf.set(names[name], value)
    yield
    for name, key in names.items():
        spark.conf.set(key, str(before[name]))


@ALL
def test_order_of_rows_columns_and_partitions_means_nothing(spark: SparkSession, cases: tuple[Rows, Rows], rule: Rule) -> None:
    """Rows shuffled, columns reversed, more partitions: the same values, ties included."""
    spine, rows = cases
    expected = join(spine_frame(spark, spine), feature_frame(spark, rows), rule)
    rng = random.Random(SEED)
    other_spine = spine_frame(spark, rng.sample(spine, len(spine))).repartition(5)
    other = feature_frame(spark, rng.sample(rows, len(rows)))
    other = other.select(*reversed(other.columns)).repartition(7, "label")
    assert join(other_spine, other, rule) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"shuffle__partitions": "7"},
        {"adaptive__enabled": "false"},
        {"ansi__enabled": "false"},
        {"codegen__wholeStage": "false"},
        {"caseSensitive": "true"},
        {"autoBroadcastJoinThreshold": "-1"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_spark_settings_mean_nothing(spark: SparkSession, cases: tuple[Rows, Rows], values: dict[str, str]) -> None:
    """Partition count, adaptive execution, ANSI mode, code generation and join thresholds change no value."""
    spine, features = spine_frame(spark, cases[0]), feature_frame(spark, cases[1])
    expected = join(spine, features, TTL)
    with settings(spark, **values):
        assert join(spine, features, TTL) == expected


@pytest.mark.parametrize("session_zone", ZONES, indirect=True)
def test_ttl_counts_microseconds_across_clock_changes(spark: SparkSession, session_zone: str) -> None:
    """A day of ttl is 24 hours, also on the day that has 23 or 25 in the session time zone."""
    spring, autumn = 1_741_510_800_000_000, 1_762_074_000_000_000  # 2025-03-09T09:00Z and 2025-11-02T09:00Z
    day = 24 * HOUR
    spine = [
        {"row": n, "case": n, "a": 1, "b": "1", "event_timestamp": t} for n, t in enumerate([spring, spring, autumn, autumn])
    ]
    rows = [
        {"case": n, "a": 1, "b": "1", "event_timestamp": row["event_timestamp"] - age, "rid": n}
        for n, (row, age) in enumerate(zip(spine, [day, day + 1, day, day + 1], strict=True))
    ]
    values = join(spine_frame(spark, spine), feature_frame(spark, rows), replace(PLAIN, ttl_micros=day))
    assert [values[n][0][1] for n in range(4)] == [0, None, 2, None]


@ALL
def test_the_future_means_nothing(spark: SparkSession, alone: tuple[Rows, Rows], rule: Rule) -> None:
    """A row's values depend only on feature rows at or before its time: without the later ones they are the same."""
    spine, rows = alone
    time_of = {row["case"]: row["event_timestamp"] for row in spine}
    past = [row for row in rows if row["event_timestamp"] is not None and row["event_timestamp"] <= time_of[row["case"]]]
    assert len(past) < len(rows)
    frame = spine_frame(spark, spine)
    assert join(frame, feature_frame(spark, past), rule) == join(frame, feature_frame(spark, rows), rule)


def test_rows_known_later_mean_nothing_to_known_at(spark: SparkSession, alone: tuple[Rows, Rows]) -> None:
    """With known_at a backfill created after t changes nothing, however it is dated."""
    spine, rows = alone
    backfill = [
        {**_matching(row), "event_timestamp": row["event_timestamp"], "created_timestamp": row["event_timestamp"] + 1}
        for row in spine
    ]
    frame = spine_frame(spark, spine)
    expected = join(frame, feature_frame(spark, rows), KNOWN)
    assert join(frame, feature_frame(spark, rows + backfill), KNOWN) == expected
    at_t = [{**row, "created_timestamp": row["event_timestamp"]} for row in backfill]
    assert join(frame, feature_frame(spark, rows + at_t), KNOWN) != expected


def _matching(row: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A feature row with the keys of a spine row and the number -row - 1."""
    return {"case": row["case"], "a": row["a"], "b": row["b"], "rid": -row["row"] - 1, **values}


def test_a_row_exactly_at_t_wins_and_one_microsecond_later_does_not(spark: SparkSession, alone: tuple[Rows, Rows]) -> None:
    """The upper bound is inclusive, to the microsecond."""
    spine, rows = alone
    frame = spine_frame(spark, spine)
    expected = join(frame, feature_frame(spark, rows), PLAIN)
    for step in (0, 1):
        added = [_matching(row, event_timestamp=row["event_timestamp"] + step, created_timestamp=2**52) for row in spine]
        found = join(frame, feature_frame(spark, rows + added), PLAIN)
        if step:
            assert found == expected
        else:
            keyed = [row for row in spine if row["a"] is not None and row["b"] is not None]
            assert [found[row["row"]][0][1] for row in keyed] == [-row["row"] - 1 for row in keyed]


def test_ttl_is_inclusive_to_the_microsecond(spark: SparkSession, alone: tuple[Rows, Rows]) -> None:
    """With nothing newer, a row at t - ttl is seen and one a microsecond older is not."""
    spine = [row for row in alone[0] if row["a"] is not None]
    frame = spine_frame(spark, spine)
    for older, seen in ((0, True), (1, False)):
        rows = [_matching(row, event_timestamp=row["event_timestamp"] - HOUR - older) for row in spine]
        found = join(frame, feature_frame(spark, rows), TTL)
        assert all((values[0][1] is not None) == seen for values in found.values())


def test_a_longer_ttl_only_fills_nulls(spark: SparkSession, cases: tuple[Rows, Rows]) -> None:
    """A longer ttl never changes a value that a shorter one found."""
    spine, features = spine_frame(spark, cases[0]), feature_frame(spark, cases[1])
    shorter = join(spine, features, TTL)
    longer = join(spine, features, replace(TTL, ttl_micros=None))
    changed = [row for row in shorter if shorter[row] != longer[row]]
    assert changed
    assert all(shorter[row] == [(None, None, None)] for row in changed)


@ALL
def test_other_keys_and_older_rows_mean_nothing(spark: SparkSession, alone: tuple[Rows, Rows], rule: Rule) -> None:
    """Rows of other keys never count, nor does a row older than all the others where one of them won."""
    spine, rows = alone
    frame = spine_frame(spark, spine)
    expected = join(frame, feature_frame(spark, rows), rule)
    old = min(row["event_timestamp"] for row in rows if row["event_timestamp"] is not None) - 1
    others = [
        {**_matching(row), "a": 7, "b": "7", "event_timestamp": row["event_timestamp"], "created_timestamp": old}
        for row in spine
    ]
    assert join(frame, feature_frame(spark, rows + others), rule) == expected
    older = [_matching(row, event_timestamp=old, created_timestamp=old) for row in spine]
    found = join(frame, feature_frame(spark, rows + older), rule)
    won = [row for row, values in expected.items() if values[0][1] is not None]
    assert [found[row] for row in won] == [expected[row] for row in won]


@ALL
def test_duplicates(spark: SparkSession, cases: tuple[Rows, Rows], rule: Rule) -> None:
    """Feature rows given twice change nothing; spine rows given twice come out twice."""
    spine, rows = cases
    expected = join(spine_frame(spark, spine), feature_frame(spark, rows), rule)
    found = join(spine_frame(spark, spine + spine), feature_frame(spark, rows + rows), rule)
    assert found == {row: values * 2 for row, values in expected.items()}


@ALL
def test_parts_make_the_whole(spark: SparkSession, cases: tuple[Rows, Rows], rule: Rule) -> None:
    """Half the spine and the other half, or the features of half the keys and of the others, make the whole result."""
    spine, rows = cases
    features = feature_frame(spark, rows)
    expected = join(spine_frame(spark, spine), features, rule)
    halves = [join(spine_frame(spark, spine[start::2]), features, rule) for start in (0, 1)]
    assert {**halves[0], **halves[1]} == expected
    for remainder in (0, 1):
        own_spine = spine_frame(spark, [row for row in spine if row["case"] % 2 == remainder])
        own_rows = feature_frame(spark, [row for row in rows if row["case"] % 2 == remainder])
        part = join(own_spine, own_rows, rule)
        assert part == {row: expected[row] for row in part}


@ALL
def test_shifted_times_and_renamed_keys_mean_nothing(spark: SparkSession, cases: tuple[Rows, Rows], rule: Rule) -> None:
    """All times moved by the same span, and keys mapped one to one, give the same values."""

    def moved(rows: Rows) -> Rows:
        span = 12_345_678_901_234
        return [
            {
                name: None
                if value is None
                else value + span
                if name.endswith("_timestamp")
                else value * 1_000_003
                if name == "a"
                else value
                for name, value in row.items()
            }
            for row in rows
        ]

    spine, rows = cases
    # The hash of the other key column is part of the tie-break where it is no key itself, so `b` stays as it is.
    expected = join(spine_frame(spark, spine), feature_frame(spark, rows), rule)
    assert join(spine_frame(spark, moved(spine)), feature_frame(spark, moved(rows)), rule) == expected


def _view(features: DataFrame, rule: Rule, name: str) -> AsofView:
    structural = {*rule.on, "event_timestamp", "created_timestamp"}
    return AsofView(
        name=name,
        keys=tuple((key, key) for key in rule.on),
        features=tuple((value, f"{name}_{value}") for value in VALUES),
        columns=tuple(features.dtypes),
        created_time="created_timestamp",
        ttl=None if rule.ttl_micros is None else timedelta(microseconds=rule.ttl_micros),
        hash_columns=tuple(column for column in features.columns if column not in structural),
    )


@pytest.mark.parametrize("known_at", [False, True])
def test_views_together_are_views_one_by_one(spark: SparkSession, cases: tuple[Rows, Rows], known_at: bool) -> None:
    """One join of many views, pruned by time and keys or not, gives what single unpruned joins give."""
    spine, features = spine_frame(spark, cases[0]), feature_frame(spark, cases[1])
    rules = [replace(rule, known_at=known_at) for rule in RULES[:5]]
    views = [_view(features, rule, f"v{number}") for number, rule in enumerate(rules)]
    stats = spine_stats(spine, "event_timestamp", [rule.on for rule in rules])
    frames = {view.name: features for view in views}
    for known in (None, stats):
        plan = plan_asof(views, spine.dtypes, stats=known, known_at=known_at)
        assert len(plan.groups) == 3
        joined = execute(plan, spine, frames)
        found = joined_values(joined, [output for view in views for _, output in view.features])
        for number, rule in enumerate(rules):
            alone = join(spine, features, rule)
            width = len(VALUES)
            assert {row: [v[width * number : width * (number + 1)] for v in values] for row, values in found.items()} == alone


def test_pruning_drops_no_visible_row(spark: SparkSession, cases: tuple[Rows, Rows]) -> None:
    """A spine of one key and one instant is pruned hard, and still sees all it may see."""
    spine, rows = cases
    features = feature_frame(spark, rows)
    expected = join(spine_frame(spark, spine), features, TTL)
    matched = [row for row in spine if expected[row["row"]][0][1] is not None][:6]
    assert matched
    for row in matched:
        frame = spine_frame(spark, [row])
        stats = spine_stats(frame, "event_timestamp", [TTL.on])
        plan = plan_asof([_view(features, TTL, "v")], frame.dtypes, stats=stats)
        assert plan.groups[0].semi_join
        values = joined_values(execute(plan, frame, {"v": features}), [f"v_{name}" for name in VALUES])
        assert values == {row["row"]: expected[row["row"]]}
