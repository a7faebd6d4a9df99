"""What is stored beside what should be: each way in which a row or a value can be at fault is found and named."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
import redis

from spark_fs.online import codec
from spark_fs.online.compare import compare_rows, stored_keys
from spark_fs.online.connect import has_token, leave_token
from spark_fs.online.redis_store import OnlineTarget, bury_batches, write_batches
from spark_fs.spec import Column
from spark_fs.types import Float64, Int64
from tests.online.servers import NOON, UTC, batch, target_of, view_of

HOUR = timedelta(hours=1)


def compared(target: OnlineTarget, expected: pa.RecordBatch, restated: Sequence[int] = ()) -> tuple[Any, Any]:
    """Counts by feature and status, and findings as (key, feature, status)."""
    found = pa.Table.from_batches(compare_rows(iter([expected]), target, frozenset(restated)))
    rows = found.to_pylist()
    counts = {(row["feature"], row["status"]): row["rows"] for row in rows if row["key"] is None}
    return counts, [(row["key"], row["feature"], row["status"]) for row in rows if row["key"] is not None]


def test_every_fault_has_its_name(url: str, client: redis.Redis) -> None:
    """Equal, missing, buried, stale, of another schema, too short, ahead, and a value changed in place."""
    target = target_of(url)
    names = [b"equal", b"missing", b"buried", b"stale", b"schema", b"short", b"ahead", b"changed"]
    right = batch(names, NOON, n=range(8), s=["x"] * 8)
    write_batches(iter([right]), target)
    key = {name: codec.redis_key(target.prefix, name) for name in names}
    client.delete(key[b"missing"], key[b"stale"])
    bury_batches(iter([batch([b"buried"])]), replace(target, generation=2, restating=True))
    write_batches(iter([batch([b"stale"], NOON - HOUR, n=[3], s=["x"])]), target)
    write_batches(iter([batch([b"ahead"], NOON + HOUR, n=[6], s=["x"])]), target)
    client.setrange(key[b"schema"], 24, b"\x00\x00\x00\x01")
    client.set(key[b"short"], "short")
    client.setrange(key[b"changed"], 29, b"\x63")  # the lowest byte of n
    counts, findings = compared(target, right)
    whole = {b"missing": "missing", b"buried": "missing", b"stale": "stale", b"schema": "wrong", b"short": "wrong"}
    assert sorted(findings) == sorted([*((name, None, status) for name, status in whole.items()), (b"changed", "n", "wrong")])
    shared = {"equal": 1, "missing": 2, "stale": 1, "wrong": 2, "ahead": 1}
    assert {status: n for (feature, status), n in counts.items() if feature == "n"} == {**shared, "wrong": 3}
    assert {status: n for (feature, status), n in counts.items() if feature == "s"} == {**shared, "equal": 2}


def test_what_is_on_purpose_is_no_fault(url: str) -> None:
    """A restated row is older than the newest; a row past its ttl is not seen by readers; an erased key has none."""
    target, now = target_of(url, view_of(ttl=2 * HOUR)), datetime.now(UTC)
    expected = batch([b"restated", b"expired", b"erased"], [now, now - 3 * HOUR, now], n=[1, 2, 3])
    never = replace(target, ttl=None)
    restating = replace(never, generation=2, restating=True)
    write_batches(iter([batch([b"restated"], now - HOUR, n=[1])]), restating)
    known = replace(target, erased=frozenset([codec.key_digest(target.key_space, b"erased")]))
    assert compared(known, expected, [2]) == (
        {("n", "restated"): 1, ("s", "restated"): 1, ("n", "expired"): 1, ("s", "expired"): 1},
        [],
    )
    assert compared(known, expected.slice(0, 1), [3])[1] == [(b"restated", None, "stale")]


def test_a_row_that_was_built_again_is_equal_unless_its_values_differ(url: str) -> None:
    """Later builds of the same rows are not sent; at the same time the older build is the stale one."""
    target = target_of(url)
    write_batches(iter([batch([b"a", b"b", b"c"], NOON, builds=[1, 1, 3], n=[1, 2, 3])]), target)
    counts, findings = compared(target, batch([b"a", b"b", b"c"], NOON, builds=2, n=[1, 20, 30]))
    assert findings == [(b"b", "n", "stale")]
    assert {status: rows for (feature, status), rows in counts.items() if feature == "n"} == {
        "equal": 1,
        "stale": 1,
        "ahead": 1,
    }
    assert counts["s", "equal"] == 3


def test_a_row_that_expires_while_others_are_compared_is_not_missing(url: str, client: redis.Redis) -> None:
    """The clock is read when the row was asked for: it was there when the audit began, and rightly is no more."""
    target = target_of(url, view_of(ttl=2 * HOUR))
    event = datetime.now(UTC) - 2 * HOUR + timedelta(milliseconds=400)
    going = batch([b"going"], event, n=[1])
    assert write_batches(iter([going]), target).applied == 1

    def rows() -> Iterator[pa.RecordBatch]:
        yield batch([b"lost"], event + HOUR, n=[2])
        while client.dbsize():
            time.sleep(0.01)
        yield going

    found = pa.Table.from_batches(compare_rows(rows(), target, frozenset())).to_pylist()
    counts = {(row["feature"], row["status"]): row["rows"] for row in found if row["key"] is None}
    assert counts == {("n", "missing"): 1, ("s", "missing"): 1, ("n", "expired"): 1, ("s", "expired"): 1}


@pytest.mark.parametrize("wrong_by", [-HOUR, HOUR])
def test_the_clock_of_the_server_counts(url: str, monkeypatch: pytest.MonkeyPatch, wrong_by: timedelta) -> None:
    """Not that of the worker, which may be wrong: rows half an hour younger and older than their ttl."""
    target, now, old = target_of(url), datetime.now(UTC), 2 * HOUR
    rows = batch([b"young", b"old"], [now - old + HOUR / 2, now - old - HOUR / 2], n=[1, 2])
    write_batches(iter([rows]), target)
    real, real_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + wrong_by.total_seconds())
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + wrong_by // timedelta(microseconds=1) * 1000)
    counted = compared(replace(target, ttl=old), rows)[0]
    assert counted == {("n", "equal"): 1, ("s", "equal"): 1, ("n", "expired"): 1, ("s", "expired"): 1}


def test_values_are_compared_to_the_last_bit(url: str, client: redis.Redis) -> None:
    """NaN is NaN, 0.0 is -0.0, and null is not 0."""
    features = (Column("f", Float64), Column("i", Int64))
    target = target_of(url, view_of(features=features))
    stored = batch([b"a", b"b", b"c"], features=features, f=[float("nan"), 0.0, None], i=[None, 0, 7])
    wanted = batch([b"a", b"b", b"c"], features=features, f=[float("nan"), -0.0, 0.0], i=[0, 0, 7])
    write_batches(iter([stored]), target)
    assert compared(target, stored) == ({("f", "equal"): 3, ("i", "equal"): 3}, [])
    assert sorted(compared(target, wanted)[1]) == [(b"a", "i", "wrong"), (b"c", "f", "wrong")]


def test_all_rows_online_are_listed_and_no_tombstones(url: str) -> None:
    """Whatever their keys hold; rows of other views and marks of runs are not among them."""
    target = target_of(url)
    keys = [b"", b"}:", b"{a}:b", b"*", b"x\x00y"]
    write_batches(iter([batch([*keys, b"gone"])]), target)
    write_batches(iter([batch([b"other"])]), replace(target, prefix=b"flights:weather@10:"))
    bury_batches(iter([batch([b"gone"])]), replace(target, generation=2, restating=True))
    leave_token(url, target.prefix, "token")
    found = pa.Table.from_batches(stored_keys(iter([]), target))
    assert sorted(set(found["_key"].to_pylist())) == sorted(keys)


def test_a_mark_tells_of_lost_data(url: str, client: redis.Redis) -> None:
    """It is found as long as the server keeps what it was given; older marks stay beside it."""
    prefix = target_of(url).prefix
    assert not has_token(url, prefix, "one")
    for token in ("one", "two"):
        leave_token(url, prefix, token)
    assert [has_token(url, prefix, token) for token in ("one", "two", "tw")] == [True, True, False]
    client.flushall()
    assert not has_token(url, prefix, "two")
