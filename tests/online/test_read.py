"""What readers get: values, statuses, times, and errors that say what to do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal as Exact
from typing import Any

import pytest
import redis

from spark_fs.errors import InvalidError, UnavailableError
from spark_fs.online import codec
from spark_fs.online.connect import serve_epoch, served_epoch
from spark_fs.online.read import NOT_FOUND, NULL_VALUE, OUTSIDE_MAX_AGE, PRESENT, OnlineReader
from spark_fs.online.redis_store import write_batches
from spark_fs.spec import Column, ViewSpec, select
from spark_fs.types import Array, Bool, Bytes, Date, Decimal, Embedding, Float32, Float64, Int64, String, Timestamp
from tests.online.servers import FEATURES, NOON, UTC, batch, target_of, view_of

WEATHER = view_of()
ROUTES = view_of("routes", keys=(Column("origin", String), Column("flight", Int64)), features=(Column("delay", Float64),))
GLOBAL = view_of("global", keys=(), features=(Column("total", Int64),))
HOUR = timedelta(hours=1)


def write(url: str, view: ViewSpec, *keys: bytes, events: Any = NOON, **values: Any) -> None:
    write_batches(iter([batch(keys, events, features=view.features, **values)]), target_of(url, view))


@pytest.fixture
def filled(url: str) -> str:
    """A server with weather for JFK and LGA, one route, and one value for all."""
    write(url, WEATHER, b"JFK", b"LGA", n=[1, None], s=["wet", ""])
    write(url, ROUTES, codec.key_bytes(["JFK", 7], ROUTES.keys), delay=[2.5])
    write(url, GLOBAL, b"", total=[99])
    return url


def test_values_of_many_views_for_many_rows(filled: str) -> None:
    """Rows come back in order with duplicates, entity columns first; null and missing values are told apart."""
    rows = [{"origin": origin, "flight": 7, "note": i} for i, origin in enumerate(["LGA", "JFK", "XXX", "JFK"])]
    with OnlineReader(filled) as reader:
        found = reader.read([select(WEATHER), select(ROUTES), select(GLOBAL)], rows)
    assert found.to_dict() == {
        "origin": ["LGA", "JFK", "XXX", "JFK"],
        "flight": [7, 7, 7, 7],
        "note": [0, 1, 2, 3],
        "n": [None, 1, None, 1],
        "s": ["", "wet", None, "wet"],
        "delay": [None, 2.5, None, 2.5],
        "total": [99, 99, 99, 99],
    }
    assert found.statuses == {
        "n": [NULL_VALUE, PRESENT, NOT_FOUND, PRESENT],
        "s": [PRESENT, PRESENT, NOT_FOUND, PRESENT],
        "delay": [NOT_FOUND, PRESENT, NOT_FOUND, PRESENT],
        "total": [PRESENT] * 4,
    }
    assert found.event_timestamps["n"] == [NOON, NOON, None, NOON]
    assert found.to_dict(include_event_timestamps=True)["delay__ts"] == [None, NOON, None, NOON]
    assert (len(found), found.feature_names) == (4, ("n", "s", "delay", "total"))


def test_columns_in_place_of_rows(filled: str) -> None:
    """A mapping of columns asks the same as a list of rows; no rows give no values."""
    with OnlineReader(filled) as reader:
        assert reader.read([select(WEATHER, ["n"])], {"origin": ["JFK", "LGA"]}).to_dict()["n"] == [1, None]
        for nothing in ([], {"origin": []}):
            assert reader.read([select(GLOBAL)], nothing).to_dict()["total"] == []
        with pytest.raises(InvalidError, match="SFS-607"):
            reader.read([select(WEATHER)], {"origin": ["JFK"], "flight": []})


def test_renamed_keys_and_aliases(filled: str) -> None:
    """One view may be read twice under two names with two keys, in the same round trip."""
    origin = select(WEATHER, ["n"], "from", {"origin": "a"})
    target = select(WEATHER, ["n", "s"], "to", {"origin": "b"})
    with OnlineReader(filled) as reader:
        found = reader.read([origin, target], [{"a": "JFK", "b": "LGA"}], full_feature_names=True).to_dict()
        assert found == {"a": ["JFK"], "b": ["LGA"], "from__n": [1], "to__n": [None], "to__s": [""]}
        with pytest.raises(InvalidError, match="SFS-503"):
            reader.read([origin, target], [{"a": "JFK", "b": "LGA"}])


def test_features_come_in_the_order_asked_for(filled: str) -> None:
    """A selection decides which features come and in what order, not the view."""
    with OnlineReader(filled) as reader:
        assert list(reader.read([select(WEATHER, ["s", "n"])], [{"origin": "JFK"}]).to_dict()) == ["origin", "s", "n"]


def test_all_missing_keys_are_named(filled: str) -> None:
    """Each join key that any row lacks is reported, all at once, with the view that needs it."""
    with OnlineReader(filled) as reader, pytest.raises(InvalidError) as caught:
        reader.read([select(WEATHER), select(ROUTES)], [{"origin": "JFK", "flight": 7}, {"orgin": "LGA"}])
    assert [problem.code for problem in caught.value.problems] == ["SFS-607", "SFS-607"]
    assert "'origin' of routes, weather" in str(caught.value)
    assert "'flight' of routes" in str(caught.value)


def test_a_null_key_finds_nothing_and_a_wrong_one_is_refused(filled: str) -> None:
    """As in a training set a null key matches nothing; a key of another type is an error, never text."""
    with OnlineReader(filled) as reader:
        found = reader.read([select(ROUTES)], [{"origin": None, "flight": 7}, {"origin": "JFK", "flight": 7}])
        assert found.statuses["delay"] == [NOT_FOUND, PRESENT]
        with pytest.raises(InvalidError, match=r"SFS-606.*'flight'"):
            reader.read([select(ROUTES)], [{"origin": "JFK", "flight": "7"}])


def test_the_ttl_is_judged_at_read_time(url: str) -> None:
    """A row exactly ttl old counts, one microsecond more does not; its value is withheld and its time told."""
    view, event = view_of(ttl=HOUR), datetime.now(UTC)
    write(url, view, b"JFK", events=event, n=[1], s=["x"])
    with OnlineReader(url) as reader:
        for age, status in ((HOUR, PRESENT), (HOUR + timedelta(microseconds=1), OUTSIDE_MAX_AGE)):
            found = reader.read([select(view)], [{"origin": "JFK"}], now=event + age)
            assert found.statuses == {"n": [status], "s": [status]}
            assert found.to_dict()["n"] == [1 if status == PRESENT else None]
            assert found.event_timestamps["n"] == [event]
        assert reader.read([select(view)], [{"origin": "JFK"}]).statuses["n"] == [PRESENT]
        longer = view_of(ttl=2 * HOUR)
        assert reader.read([select(longer)], [{"origin": "JFK"}], now=event + 2 * HOUR).statuses["n"] == [PRESENT]


def test_a_value_of_another_schema_is_not_found(filled: str) -> None:
    """Bytes that another schema wrote, or nobody of ours, are never misread."""
    changed = view_of(features=(FEATURES[0], Column("s", Bytes)))
    with OnlineReader(filled) as reader:
        assert reader.read([select(changed)], [{"origin": "JFK"}]).statuses["n"] == [NOT_FOUND]
        with redis.Redis.from_url(filled) as client:
            client.set(codec.redis_key(codec.key_prefix(WEATHER), b"JFK"), b"short")
        assert reader.read([select(WEATHER)], [{"origin": "JFK"}]).statuses["n"] == [NOT_FOUND]


def test_natural_types_and_json(url: str) -> None:
    """Values are natural Python ones; JSON has text where it lacks a type, and strict JSON text can be made of it."""
    values: dict[str, tuple[Any, Any, Any]] = {
        "b": (Bool, True, True),
        "i": (Int64, 2**63 - 1, 2**63 - 1),
        "f": (Float32, -0.5, -0.5),
        "nan": (Float64, math.nan, "NaN"),
        "inf": (Float64, -math.inf, "-Infinity"),
        "s": (String, "🛫<b>", "🛫<b>"),
        "y": (Bytes, b"\x00\xff", "AP8="),
        "t": (Timestamp, NOON, "2013-07-01T12:00:00Z"),
        "d": (Date, date(2013, 7, 1), "2013-07-01"),
        "m": (Decimal(38, 18), Exact("1.000000000000000001"), "1.000000000000000001"),
        "a": (Array(Timestamp), [NOON, None], ["2013-07-01T12:00:00Z", None]),
        "e": (Embedding(2), [1.0, math.inf], [1.0, "Infinity"]),
    }
    view = view_of(features=tuple(Column(name, kind) for name, (kind, _, _) in values.items()))
    write(url, view, b"JFK", **{name: [value] for name, (_, value, _) in values.items()})
    with OnlineReader(url) as reader:
        found = reader.read([select(view)], [{"origin": "JFK"}, {"origin": "XXX"}])
    columns = found.to_dict()
    for name, (_, value, _) in values.items():
        got = columns[name][0]
        assert type(got) is type(value)
        assert got == value or (math.isnan(value) and math.isnan(got))
    assert columns["t"][0].tzinfo is timezone.utc
    body = found.to_json()
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["metadata"]["feature_names"] == ["origin", *values]
    assert body["results"][0] == {
        "values": ["JFK", "XXX"],
        "statuses": [PRESENT, PRESENT],
        "event_timestamps": [None, None],
    }
    for result, (_, _, expected) in zip(body["results"][1:], values.values(), strict=True):
        assert result["values"] == [expected, None]
        assert result["statuses"] == [PRESENT, NOT_FOUND]
        assert result["event_timestamps"] == ["2013-07-01T12:00:00Z", None]


def test_a_notebook_shows_escaped_values(filled: str) -> None:
    """Values are data, not markup; a long answer is cut; the repr shows names, no values."""
    write(filled, WEATHER, b"<i>", events=NOON, n=[5], s=["<script>"])
    with OnlineReader(filled) as reader:
        found = reader.read([select(WEATHER)], [{"origin": "<i>"}] * 30)
    page = found._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;i&gt;" in page
    assert "and 10 more rows" in page
    assert repr(found) == "OnlineResponse(30 rows: origin, n, s)"


def test_a_hundred_thousand_unknown_keys(filled: str) -> None:
    """A very long request is answered, in bounded commands, with NOT_FOUND where nothing is."""
    origins = [f"unknown-{i}" for i in range(100_000)]
    origins[77_777] = "JFK"
    began = time.monotonic()
    with OnlineReader(filled) as reader:
        found = reader.read([select(WEATHER)], {"origin": origins})
    assert [i for i, status in enumerate(found.statuses["n"]) if status != NOT_FOUND] == [77_777]
    assert found.to_dict()["n"][77_777] == 1
    assert time.monotonic() - began < 30


def test_a_request_is_one_command(filled: str) -> None:
    """All rows and views of a usual request are asked for by a single MGET."""
    with OnlineReader(filled) as reader, redis.Redis.from_url(filled) as client:
        reader.read([select(WEATHER)], [{"origin": "JFK"}])
        client.config_resetstat()
        reader.read([select(WEATHER), select(ROUTES)], [{"origin": f"{i}", "flight": i} for i in range(300)])
        calls: Any = client.info("commandstats")
    assert calls["cmdstat_mget"]["calls"] == 1
    assert set(calls) <= {"cmdstat_mget", "cmdstat_config|resetstat", "cmdstat_client|setinfo", "cmdstat_auth"}


def test_a_dead_server_and_a_wrong_password_are_clear(url: str) -> None:
    """The errors carry a code and a way out, and no password."""
    request: tuple[Any, Any] = ([select(WEATHER)], [{"origin": "JFK"}])
    with (
        OnlineReader("redis://u:s3cret@127.0.0.1:1/0") as reader,
        pytest.raises(UnavailableError, match="SFS-601") as dead,
    ):
        reader.read(*request)
    wrong = "redis://:s3cret@" + url.split("@")[1]
    with OnlineReader(wrong) as reader, pytest.raises(InvalidError, match="SFS-602") as refused:
        reader.read(*request)
    assert "s3cret" not in f"{dead.value}{refused.value}{reader!r}"


def test_reading_is_light_to_import() -> None:
    """A serving process loads neither Spark nor data-frame libraries, and imports the reader in under 0.3 s."""
    heavy = ("pyspark", "pandas", "sqlalchemy", "pyarrow", "numpy", "redis")
    script = (
        "import sys, time; began = time.perf_counter(); import spark_fs.online.read; "
        "print(time.perf_counter() - began); "
        f"print([name for name in {heavy} if name in sys.modules]); "
        "spark_fs.online.read.OnlineReader('redis://127.0.0.1:1/0'); "
        f"print([name for name in {heavy[:5]} if name in sys.modules])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
        for _ in range(5)
    ]
    assert min(float(run[0]) for run in runs) < 0.3
    assert runs[0][1] == "[]"
    assert runs[0][2] == "[]"


def test_a_read_gives_rows_of_one_epoch_however_often_it_changes(url: str) -> None:
    """In a read of many entities all are old or all are new; a reader that lives sees the change at its next read."""
    view = view_of()
    target, keys = target_of(url), [b"%d" % number for number in range(300)]
    for epoch in (0, 1):
        write_batches(iter([batch(keys, n=[epoch] * 300)]), target.of_epoch(epoch))
    rows = {"origin": [key.decode() for key in keys]}
    ended = threading.Event()

    def switch() -> None:
        epoch = 0
        while not ended.is_set():
            epoch = 1 - epoch
            serve_epoch(url, target.prefix, epoch)

    with OnlineReader(url) as reader, OnlineReader(url) as watcher:
        assert set(reader.read([select(view, ["n"])], rows).to_dict()["n"]) == {0}
        serve_epoch(url, target.prefix, 1)
        assert set(reader.read([select(view, ["n"])], rows).to_dict()["n"]) == {1}
        switching = threading.Thread(target=switch)
        switching.start()
        seen = [set(watcher.read([select(view, ["n"])], rows).to_dict()["n"]) for _ in range(300)]
        ended.set()
        switching.join()
    assert {frozenset(values) for values in seen} == {frozenset({0}), frozenset({1})}
    assert served_epoch(url, target.prefix) in (0, 1)
