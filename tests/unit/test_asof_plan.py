"""Planning an as-of join: grouping, pruning and checks, all without a JVM."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest

from spark_fs.errors import InvalidError
from spark_fs.intervals import BEGINNING
from spark_fs.offline.asof_plan import BROADCAST_KEYS, AsofView, SpineStats, plan_asof

FIRST = datetime(2024, 3, 1, tzinfo=timezone.utc)
LAST = datetime(2024, 6, 1, 12, 30, 0, 5, tzinfo=timezone.utc)
SPINE = [("user_id", "bigint"), ("shop", "string"), ("event_timestamp", "timestamp"), ("label", "int")]


def view(name: str = "spend", *keys: tuple[str, str], key_type: str = "bigint", **wanted: object) -> AsofView:
    keys = keys or (("user_id", "user_id"),)
    columns = [(key, key_type) for _, key in keys] + [
        ("event_timestamp", "timestamp"),
        ("created_timestamp", "timestamp"),
        ("amount", "double"),
        ("note", "string"),
    ]
    defaults = {"features": (("amount", f"{name}_amount"),), "unique": True, "columns": tuple(columns)}
    return AsofView(name=name, keys=keys, **{**defaults, **wanted})  # type: ignore[arg-type]


def stats(**distinct: int) -> SpineStats:
    return SpineStats(1000, 0, FIRST, LAST, {tuple(name.split("__")): count for name, count in distinct.items()})


def codes(*views: AsofView, spine: list[tuple[str, str]] = SPINE, **wanted: object) -> list[str]:
    with pytest.raises(InvalidError) as raised:
        plan_asof(views, spine, **wanted)  # type: ignore[arg-type]
    return [problem.code for problem in raised.value.problems]


def test_planning_loads_no_spark() -> None:
    """The plan module imports neither pyspark nor pandas."""
    code = "import sys, spark_fs.offline.asof_plan; print(sorted({'pyspark', 'pandas', 'py4j'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_views_of_equal_spine_keys_share_a_group() -> None:
    """Views are grouped by the spine columns they use, whatever their own key names and the order of the keys."""
    views = [
        view("a"),
        view("b", ("user_id", "payer")),
        view("c", ("shop", "s"), ("user_id", "u"), key_type="string"),
        view("d", ("user_id", "u"), ("shop", "s"), key_type="string"),
    ]
    spine = [(name, "string" if name == "user_id" else type_) for name, type_ in SPINE]
    views[:2] = [view("a", key_type="string"), view("b", ("user_id", "payer"), key_type="string")]
    plan = plan_asof(views, spine)
    assert [[member.name for member in group.views] for group in plan.groups] == [["a", "b"], ["c", "d"]]
    assert [[key for key, _ in group.keys] for group in plan.groups] == [["user_id"], ["shop", "user_id"]]
    assert plan.outputs == ("a_amount", "b_amount", "c_amount", "d_amount")


def test_keys_are_compared_in_the_widest_integer_type() -> None:
    """A group's key type is the widest among the spine and its views, so that no value is cut."""
    spine = [("user_id", "smallint"), ("event_timestamp", "timestamp")]
    plan = plan_asof([view("a", key_type="tinyint"), view("b", key_type="bigint")], spine)
    assert plan.groups[0].keys == (("user_id", "bigint"),)
    assert plan_asof([view("a", key_type="tinyint")], spine).groups[0].keys == (("user_id", "smallint"),)


def test_time_range_is_first_minus_ttl_to_last() -> None:
    """Rows outside [first - ttl, last] cannot be visible; without ttl, or with one from before year 1, none is too old."""
    plan = plan_asof([view()], SPINE, stats=stats())
    assert plan.time_range(view(ttl=timedelta(days=7))) == (FIRST - timedelta(days=7), LAST)
    for ttl in (None, timedelta(0), timedelta(days=999_999)):
        assert plan.time_range(view(ttl=ttl)) == (BEGINNING, LAST)
    assert plan_asof([view()], SPINE).time_range(view()) is None
    assert plan_asof([view()], SPINE, stats=SpineStats(0, 0, None, None)).time_range(view()) is None


def test_few_keys_are_broadcast_and_many_are_not() -> None:
    """The semi-join is decided by the number of distinct spine keys, at the stated bound."""
    for count, expected in ((0, True), (BROADCAST_KEYS, True), (BROADCAST_KEYS + 1, False)):
        assert plan_asof([view()], SPINE, stats=stats(user_id=count)).groups[0].semi_join is expected
    assert not plan_asof([view()], SPINE).groups[0].semi_join
    assert not plan_asof([view()], SPINE, stats=stats(shop=1)).groups[0].semi_join


def test_read_columns_are_keys_times_features_and_hashed_ones() -> None:
    """A view with unique rows reads only what is asked for; one with ties reads all its values for the row hash."""
    assert view(hash_columns=("amount", "note")).read_columns == ("user_id", "event_timestamp", "amount")
    tied = view(unique=False, hash_columns=("amount", "note"), created_time="created_timestamp")
    assert tied.read_columns == ("user_id", "event_timestamp", "created_timestamp", "amount", "note")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("bigint", "string"),
        ("double", "double"),
        ("int", "decimal(10,0)"),
        ("decimal(10,0)", "decimal(12,0)"),
        ("string collate UTF8_LCASE", "string collate UTF8_LCASE"),
        ("struct<a:int>", "struct<a:int>"),
        ("date", "timestamp"),
    ],
)
def test_keys_that_cannot_be_compared_exactly_are_refused(left: str, right: str) -> None:
    """Only integers may differ in type; floats, collated and nested keys are refused; both types are named."""
    spine = [("user_id", left), ("event_timestamp", "timestamp")]
    with pytest.raises(InvalidError, match="SFS-505") as raised:
        plan_asof([view(key_type=right)], spine)
    assert f"is {left} in the spine, 'user_id' is {right} in view 'spend'" in str(raised.value)


@pytest.mark.parametrize("type_", ["timestamp_ntz", "string", "date", "bigint"])
def test_times_without_zone_are_refused(type_: str) -> None:
    """The spine's and the views' times must be TIMESTAMP."""
    spine = [("user_id", "bigint"), ("event_timestamp", type_)]
    assert codes(view(), spine=spine) == ["SFS-506"]
    assert codes(view(event_time="at", columns=(("user_id", "bigint"), ("at", type_), ("amount", "double")))) == ["SFS-506"]


def test_missing_columns_are_named_with_the_closest_one() -> None:
    """A missing column's error says where it was looked for and what is there."""
    with pytest.raises(InvalidError) as raised:
        plan_asof([view("spend", ("usr_id", "user_id"), features=(("amout", "amount"),))], SPINE)
    text = str(raised.value)
    assert "[SFS-504] Column 'usr_id' is missing in the spine. Did you mean 'user_id'?" in text
    assert "[SFS-504] Column 'amout' is missing in view 'spend'. Did you mean 'amount'?" in text
    assert codes(view(features=(("note", "n"),), columns=(*view().columns, ("note", "int")))) == ["SFS-504"]


def test_output_names_that_clash_are_refused() -> None:
    """No two output columns may have the same name, be it in other case, and no feature may hide a spine column."""
    assert codes(view(features=(("amount", "LABEL"),))) == ["SFS-503"]
    assert codes(view("a", features=(("amount", "x"),)), view("b", features=(("amount", "x"),))) == ["SFS-503"]
    assert codes(view(), spine=[*SPINE, ("label", "int")]) == ["SFS-503"]


def test_known_at_needs_created_times() -> None:
    """known_at is refused for a view without created time; a negative ttl always."""
    assert codes(view(), known_at=True) == ["SFS-507"]
    assert codes(view(ttl=timedelta(seconds=-1))) == ["SFS-508"]
    assert plan_asof([view(created_time="created_timestamp")], SPINE, known_at=True).known_at


def test_explain_tells_what_is_read_and_why() -> None:
    """The text names strategy, reason, source, columns, time range and key pruning; the JSON says the same as data."""
    views = [
        view("spend", ttl=timedelta(days=7), source="feature table spend@1, Delta version 12"),
        view("shop", ("shop", "id"), key_type="string"),
    ]
    seen = SpineStats(1_000_000, 3, FIRST, LAST, {("user_id",): 12_000, ("shop",): 200_000})
    plan = plan_asof(views, SPINE, stats=seen)
    assert str(plan) == "\n".join(
        [
            "As-of join of 1,000,000 spine rows on event_timestamp; visible by event time.",
            "The spine's times go from 2024-03-01T00:00:00Z to 2024-06-01T12:30:00.000005Z.",
            "3 spine rows have no time and get nulls.",
            "1. keys user_id: window: one shuffle and one sort for the view; "
            "feature rows: only those of the spine (about 12,000, at most 100,000 are broadcast)",
            "   - spend: feature table spend@1, Delta version 12",
            "     why: its rows do not come from a feature table",
            "     reads user_id, event_timestamp, amount",
            "     event times: 2024-02-23T00:00:00Z to 2024-06-01T12:30:00.000005Z (ttl 7 days, 0:00:00)",
            "2. keys shop: window: one shuffle and one sort for the view; "
            "feature rows: all (about 200,000, more than 100,000 are not broadcast)",
            "   - shop: a DataFrame",
            "     why: its rows do not come from a feature table",
            "     reads id, event_timestamp, amount",
            "     event times: up to 2024-06-01T12:30:00.000005Z (no ttl)",
        ]
    )
    body = json.loads(json.dumps(plan.to_json()))
    assert body["spine"]["rows"] == 1_000_000
    assert [group["semi_join"] for group in body["groups"]] == [True, False]
    assert body["groups"][0]["views"][0]["event_time_range"][0] == "2024-02-23T00:00:00Z"
    assert "a spine not looked at yet" in str(plan_asof(views, SPINE))
