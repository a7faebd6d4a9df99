"""Rules to split by, as values: what they refuse, how they are written down, how they are read from text."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from spark_fs.datasets.saving import Wish, parse_wish
from spark_fs.datasets.splits import KFold, RandomSplit, SplitRule, TimeSplit, parse_split, split_from_json
from spark_fs.errors import InvalidError

JULY, OCTOBER = (datetime(2013, month, 1, tzinfo=timezone.utc) for month in (7, 10))
RULES: list[SplitRule] = [
    TimeSplit((JULY,)),
    TimeSplit((JULY, OCTOBER), gap=timedelta(days=1.5)),
    RandomSplit((0.7, 0.3), by=("user_id",), seed=7),
    RandomSplit((0.8, 0.1, 0.1), ("a", "b", "c"), ("x", "y"), stratify="late", bounds={"true": (0.5, 0.9), "null": (0.7, 0.8)}),
    KFold(5, ("user_id",), 3),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_is_what_it_was_after_it_was_written_down(rule: SplitRule):
    """As JSON values and back."""
    assert split_from_json(rule.to_json()) == rule


@pytest.mark.parametrize(
    ("given", "options", "rule"),
    [
        ("time=2013-07-01,2013-10-01", {"gap": timedelta(days=2)}, TimeSplit((JULY, OCTOBER), gap=timedelta(days=2))),
        ("random=0.8,0.2", {"by": ["user_id"], "seed": 4}, RandomSplit((0.8, 0.2), by=("user_id",), seed=4)),
        ("random=0.5,0.25,0.25", {"stratify": "late"}, RandomSplit((0.5, 0.25, 0.25), stratify="late")),
        ("kfold=5", {"seed": 1}, KFold(5, seed=1)),
    ],
)
def test_a_rule_is_read_from_text(given: str, options: dict[str, Any], rule: SplitRule):
    """As a command line has it; two parts are train and test, three have a validation between them."""
    assert parse_split(given, **options) == rule
    assert parse_split("random=0.5,0.5").names == ("train", "test")
    assert parse_split("time=2013-07-01,2013-10-01").names == ("train", "validation", "test")
    assert parse_split("random=0.25,0.25,0.25,0.25").names == ("part0", "part1", "part2", "part3")


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("half", {}, "'half' is no rule"),
        ("time=", {}, "is no rule"),
        ("time=soon", {}, "ISO 8601"),
        ("random=0.5,x", {}, "is no rule"),
        ("random=0.5,0.6", {}, "sum is 1"),
        ("random=1", {}, "two or more"),
        ("random=1.5,-0.5", {}, "above 0"),
        ("kfold=1", {}, "between 2"),
        ("kfold=3", {"gap": timedelta(1)}, "does not know gap"),
        ("time=2013-07-01", {"by": ["x"]}, "does not know by"),
        ("time=2013-10-01,2013-07-01", {}, "must rise"),
        ("time=2013-07-01,2013-07-02", {"gap": timedelta(1)}, "more than the gap"),
        ("time=2013-07-01", {"gap": timedelta(-1)}, "negative"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(given: str, options: dict[str, Any], said: str):
    """SFS-515, which says what is wrong."""
    with pytest.raises(InvalidError, match=f"SFS-515.*{said}"):
        parse_split(given, **options)


def test_parts_need_names_of_their_own():
    """As many as parts, all different."""
    for names in (("train",), ("train", "train"), ("train", "")):
        with pytest.raises(InvalidError, match=r"SFS-515.*names"):
            RandomSplit((0.5, 0.5), names)
    with pytest.raises(InvalidError, match=r"SFS-515.*time zone"):
        TimeSplit((datetime(2013, 7, 1),))  # noqa: DTZ001  # that is the point


def test_a_wish_is_read_from_options_and_all_that_is_wrong_is_told_at_once():
    """Of a command line; names, labels and the column that a split adds."""
    given = {"name": "delays", "split": "kfold=3", "split_by": ["user_id"], "seed": "2", "gap_days": None, "stratify": None}
    options = SimpleNamespace(**given, label=["late"], tag=["team=growth"], description=None)
    assert parse_wish(options) == Wish("delays", KFold(3, ("user_id",), 2), ("late",), "", {"team": "growth"})
    with pytest.raises(InvalidError) as caught:
        parse_wish(SimpleNamespace(**{**given, "split": None}, label=None, tag=["growth"], description=None))
    assert [problem.code for problem in caught.value.problems] == ["SFS-515", "SFS-515"]
    with pytest.raises(InvalidError) as caught:
        Wish("1st", KFold(3), ("lat",)).check(["user_id", "late", "Split"], ["user_id", "late"])
    assert [problem.code for problem in caught.value.problems] == ["SFS-509", "SFS-515", "SFS-503"]
    assert "Did you mean 'late'" in str(caught.value)
