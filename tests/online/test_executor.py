"""What executors do: reading data files in place, keeping the newest row of each key, inserting what is new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from spark_fs.errors import SparkFSError
from spark_fs.files import create_file
from spark_fs.intervals import to_micros
from spark_fs.key_bytes import key_column
from spark_fs.online import codec, encode, executor
from spark_fs.online.redis_store import write_batches
from spark_fs.spec import Column
from spark_fs.types import Embedding, Int64, String
from tests.online.servers import FEATURES, NOON, batch, target_of, view_of
from tests.spark.test_key_bytes import VALUES

HOUR = timedelta(hours=1)


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as client:
        yield client


def stored(client: redis.Redis, key: bytes, target: Any) -> Any:
    value = client.get(codec.redis_key(target.prefix, key))
    return None if value is None else codec.Decoder(FEATURES).decode(value)


# ---- keys


@pytest.mark.parametrize(("column", "values"), VALUES, ids=[column.name for column, _ in VALUES])
def test_keys_of_whole_columns_are_those_of_single_values(column: Column, values: list[Any]) -> None:
    """For each type of join key, alone and with a second one, Arrow gives the bytes that a reader asks for."""
    array = pa.array(values, column.type.arrow())
    second = Column("second", String)
    texts = pa.array([f"{n}:é" for n in range(len(values))])
    assert key_column([array], len(values)).to_pylist() == [codec.key_bytes([v], [column]) for v in values]
    pairs = [codec.key_bytes([v, f"{n}:é"], [column, second]) for n, v in enumerate(values)]
    assert key_column([array, texts], len(values)).to_pylist() == pairs


def test_a_view_without_keys_has_one_empty_key() -> None:
    """Every row has the same key, which is empty."""
    assert key_column([], 3).to_pylist() == [b"", b"", b""]


# ---- runs


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6), st.integers(1, 5))
def test_of_each_run_the_last_row_stays_however_batches_are_cut(runs: list[tuple[int, int]], size: int) -> None:
    """Rows of one key that follow each other become one, the last, also where a batch ends between them."""
    keys = [b"%d" % key for key, length in runs for _ in range(length)]
    rows = batch(keys, n=list(range(len(keys)))) if keys else None
    cut = [rows.slice(start, size) for start in range(0, len(keys), size)] if rows else []
    kept = [n for piece in executor._newest(iter(cut), ["_key"]) for n in piece.column("n").to_pylist()]
    assert kept == [n for n, key in enumerate(keys) if n + 1 == len(keys) or keys[n + 1] != key]


# ---- files


def write_file(uri: str, rows: list[tuple[int | None, datetime, int]]) -> str:
    """A data file as a build writes it: rows (join key, event time, value); gives its URI."""
    instant = pa.timestamp("us", tz="UTC")
    table = pa.table(
        {
            "id": pa.array([row[0] for row in rows], pa.int64()),
            "event_timestamp": pa.array([row[1] for row in rows], instant),
            "created_timestamp": pa.array([None] * len(rows), instant),
            "_build": pa.array([1] * len(rows), pa.int32()),
            "n": pa.array([row[2] for row in rows], pa.int64()),
            "s": pa.array([None] * len(rows), pa.string()),
        }
    )
    with create_file(uri) as stream:
        pq.write_table(table, stream)
    return uri


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of a folder where data files lie."""
    return str(request.getfixturevalue("s3")) if request.param == "s3" else tmp_path.as_uri()


NOTES = executor.Notes(b"flights:weather@1:notes:{0}:x", "fresh")


def noted(client: redis.Redis, count: str) -> list[tuple[int, int]]:
    """The buckets that were noted, in order, and one of their counts."""
    found: Any = client.lrange(NOTES.name, 0, -1)
    notes = [json.loads(note) for note in reversed(found)]
    assert {(note["step"], note["generation"]) for note in notes} <= {("fresh", 1)}
    return [(note["bucket"], note["counts"][count]) for note in notes]


def test_each_bucket_is_noted_when_its_rows_are_confirmed(url: str, client: redis.Redis) -> None:
    """Also where a bucket goes over two batches, and where a batch has none."""
    target = target_of(url)
    buckets = [pa.array([1, 1, 2], pa.int32()), pa.array([2, 4], pa.int32()), pa.array([], pa.int32())]
    rows = [batch([b"a", b"b", b"c"]), batch([b"d", b"e"]), batch([])]
    batches = [part.append_column("_bucket", column) for part, column in zip(rows, buckets, strict=True)]
    (measures,) = executor.publish_rows(iter(batches), target, NOTES)
    assert noted(client, "applied") == [(1, 2), (2, 2), (4, 1)]
    assert measures.to_pylist()[0]["applied"] == 5


def test_the_buckets_of_a_task_share_a_connection_and_what_it_tells(url: str, client: redis.Redis) -> None:
    """Of rows that are there already the first bucket shows it; the others are looked up at once."""
    target = target_of(url)
    keys = [b"%d" % number for number in range(8_000)]
    bucket = pa.array([number // 1_000 for number in range(8_000)], pa.int32())
    rows = batch(keys, n=range(8_000)).append_column("_bucket", bucket)
    list(executor.publish_rows(iter([rows]), target))
    client.config_resetstat()
    (measures,) = executor.publish_rows(iter([rows]), target, NOTES)
    assert noted(client, "equal") == [(number, 1_000) for number in range(8)]
    assert measures.to_pylist()[0]["equal"] == 8_000
    server: dict[str, Any] = client.info("stats")  # type: ignore[assignment]
    assert server["total_connections_received"] == 2  # one for the rows, one for the notes
    calls = calls_of(client)
    assert calls["evalsha"] <= 2
    assert calls["mget"] - calls["evalsha"] == 14


def test_a_few_rows_are_not_looked_up_however_many_buckets_they_are_in(url: str, client: redis.Redis) -> None:
    """The script compares them as well, and the next ones may be unlike them."""
    rows = batch([b"%d" % number for number in range(900)], n=range(900))
    rows = rows.append_column("_bucket", pa.array([number // 100 for number in range(900)], pa.int32()))
    (first,) = executor.publish_rows(iter([rows]), target_of(url))
    (again,) = executor.publish_rows(iter([rows]), target_of(url))
    assert again.to_pylist()[0]["equal"] == 900
    assert again.to_pylist()[0]["bytes"] == first.to_pylist()[0]["bytes"]
    calls = calls_of(client)
    assert calls["mget"] == calls["evalsha"] + calls.get("eval", 0)


def test_files_are_published_newest_row_first_to_last(
    url: str, client: redis.Redis, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each key the newest row in ``[start, end)`` goes online, from several files, in batches of any size."""
    monkeypatch.setattr(executor, "BATCH_ROWS", 2)
    files = [
        write_file(f"{place}/a%20b.parquet", [(1, NOON, 10), (1, NOON + HOUR, 11), (1, NOON + 3 * HOUR, 12), (2, NOON, 20)]),
        write_file(f"{place}/c.parquet", [(3, NOON - HOUR, 30), (4, NOON + HOUR, 40)]),
    ]
    target = target_of(url, view_of(keys=[Column("id", Int64)]))
    numbers = pa.RecordBatch.from_pydict({"id": [0, 1]})
    bounds = {"start_us": to_micros(NOON), "end_us": to_micros(NOON + 3 * HOUR)}
    named, keys = list(zip(files, [5, 7], strict=True)), [Column("id", Int64)]
    (measures,) = executor.publish_files(iter([numbers]), target, named, keys, **bounds, notes=NOTES)
    assert noted(client, "applied") == [(5, 2), (7, 1)]
    assert measures.to_pylist()[0].items() >= {"rows_read": 4, "applied": 3, "equal": 0, "stale": 0}.items()
    values = {key: stored(client, b"%d" % key, target) for key in (1, 2, 3, 4)}
    assert values == {1: [11, None], 2: [20, None], 3: None, 4: [40, None]}


def test_the_first_rows_of_a_file_are_as_it_publishes_them(place: str) -> None:
    """At most as many as asked for, with their key bytes; none of a file without rows."""
    file = write_file(f"{place}/rows.parquet", [(number, NOON, number * 10) for number in range(5)])
    keys = [Column("id", Int64)]
    target = target_of("redis://nowhere", view_of(keys=keys))
    first = executor.first_rows(file, target, keys, 3)
    assert first is not None
    assert first.column("_key").to_pylist() == [b"0", b"1", b"2"]
    assert first.column("n").to_pylist() == [0, 10, 20]
    whole = executor.first_rows(file, target, keys, 100)
    assert whole is not None
    assert whole.num_rows == 5
    assert executor.first_rows(write_file(f"{place}/empty.parquet", []), target, keys, 3) is None


def test_a_vector_may_be_null_in_all_rows_of_a_batch() -> None:
    """Only vectors that are there must have the declared length."""
    features = (Column("v", Embedding(3)),)
    rows = batch([b"a", b"b"], features=features, v=[None, None])
    values = encode.encode_values(rows, features, 1).to_pylist()
    assert [codec.Decoder(features).decode(value) for value in values] == [[None], [None]]
    short = batch([b"a", b"b"], features=features, v=[None, [1.0, 2.0]])
    with pytest.raises(SparkFSError, match="vectors of length 2"):
        encode.encode_values(short, features, 1)


# ---- inserting


def test_inserting_never_replaces(url: str, client: redis.Redis) -> None:
    """Distinct rows are inserted where none of a call's keys is there; else each is compared, as always."""
    target = target_of(url)
    fresh = write_batches(iter([batch([b"a", b"b"], n=[1, 2])]), target, distinct=True)
    assert (fresh.applied, fresh.equal, fresh.stale) == (2, 0, 0)
    older = batch([b"a", b"c"], NOON - HOUR, n=[8, 9])
    mixed = write_batches(iter([older, batch([b"b", b"d"], [NOON + HOUR, NOON], n=[3, 4])]), target, distinct=True)
    assert (mixed.applied, mixed.equal, mixed.stale) == (3, 0, 1)
    assert [stored(client, key, target)[0] for key in (b"a", b"b", b"c", b"d")] == [1, 3, 9, 4]


def test_an_insert_is_counted_once_when_sent_again(url: str, client: redis.Redis) -> None:
    """A connection lost between insert and reply: what was inserted is found equal, nothing is lost."""
    target = target_of(url)
    rows = batch([b"%d" % n for n in range(5_000)], n=list(range(5_000)))

    def killing() -> Iterator[pa.RecordBatch]:
        for start in range(0, 5_000, 500):
            yield rows.slice(start, 500)
            if start in (500, 2_500):
                client.client_kill_filter(_type="normal", skipme=True)

    counts = write_batches(killing(), target, distinct=True)
    assert counts.applied + counts.equal == 5_000
    assert counts.stale == 0
    assert len(list(client.scan_iter(count=5_000))) == 5_000


def test_a_foreign_key_is_not_overwritten_by_an_insert(url: str, client: redis.Redis) -> None:
    """A key of another type stops the call: it is named, and nothing of the call is written."""
    target = target_of(url)
    client.hset(codec.redis_key(target.prefix, b"b").decode(), "field", "value")
    with pytest.raises(SparkFSError) as caught:
        write_batches(iter([batch([b"a", b"b"], n=[1, 2])]), target, distinct=True)
    assert caught.value.code == "SFS-610"
    assert stored(client, b"a", target) is None


def test_rows_with_a_ttl_are_never_inserted_without_it(url: str, client: redis.Redis) -> None:
    """MSETNX knows no expiry: rows of a view with a ttl go by the script and expire."""
    target = target_of(url, view_of(ttl=timedelta(days=36_500)))
    assert write_batches(iter([batch([b"a"], n=[1])]), target, distinct=True).applied == 1
    assert client.pttl(codec.redis_key(target.prefix, b"a").decode()) > 0


# ---- looking before writing


def rows_of(count: int, *, shift: timedelta = timedelta(), changed: range = range(0), value: int = 0) -> pa.RecordBatch:
    """So many rows of their own keys; those in ``changed`` are later and have another value."""
    events = [NOON + (shift if number in changed else timedelta()) for number in range(count)]
    values = [number + (value if number in changed else 0) for number in range(count)]
    return batch([b"%d" % number for number in range(count)], events, n=values)


def calls_of(client: redis.Redis) -> dict[str, int]:
    """How often each command was called since the last reset of the statistics, which this is too."""
    stats: dict[str, Any] = client.info("commandstats")  # type: ignore[assignment]
    client.config_resetstat()
    return {name.removeprefix("cmdstat_"): found["calls"] for name, found in stats.items()}


@pytest.mark.parametrize("ttl", [None, timedelta(days=36_500)])
def test_rows_that_are_there_are_looked_up_and_not_written(url: str, client: redis.Redis, ttl: timedelta | None) -> None:
    """Of a run that is repeated the script sees the first calls only, and counts and expiries stay."""
    target = target_of(url, view_of(ttl=ttl))
    assert write_batches(iter([rows_of(20_000)]), target, distinct=True).applied == 20_000
    expiry = client.pexpiretime(codec.redis_key(target.prefix, b"7").decode()) if ttl else None
    calls_of(client)
    again = write_batches(iter([rows_of(20_000)]), target, distinct=True)
    assert (again.equal, again.rows) == (20_000, 20_000)
    calls = calls_of(client)
    assert calls["evalsha"] + calls.get("eval", 0) <= 4
    assert calls.get("mget", 0) >= 38  # one more within each call of the script
    assert ttl is None or client.pexpiretime(codec.redis_key(target.prefix, b"7").decode()) == expiry


@pytest.mark.parametrize("share", [1, 30, 70, 99])
def test_rows_that_differ_go_on_to_the_script(url: str, client: redis.Redis, share: int) -> None:
    """Whatever part of the rows is newer, all of it is written, and nothing else."""
    target, count = target_of(url), 10_000
    write_batches(iter([rows_of(count)]), target, distinct=True)
    changed = range(2_000, 2_000 + 80 * share)
    counts = write_batches(iter([rows_of(count, shift=HOUR, changed=changed, value=1_000_000)]), target, distinct=True)
    assert (counts.applied, counts.equal, counts.stale) == (len(changed), count - len(changed), 0)
    older = write_batches(iter([rows_of(count, shift=-HOUR, changed=changed)]), target, distinct=True)
    assert (older.applied, older.equal, older.stale) == (0, count - len(changed), len(changed))
    values = client.mget([codec.redis_key(target.prefix, b"%d" % number) for number in range(count)])
    found = [codec.Decoder(FEATURES).decode(value)[0] for value in values]  # type: ignore[union-attr]
    assert found == [number + (1_000_000 if number in changed else 0) for number in range(count)]


def test_looking_in_vain_is_given_up(url: str, client: redis.Redis) -> None:
    """Rows of the same version with other values are equal to the script and never to a look: most go to the script at once."""
    target, count = target_of(url), 20_000
    write_batches(iter([rows_of(count)]), target, distinct=True)
    calls_of(client)
    counts = write_batches(iter([rows_of(count, changed=range(count), value=5)]), target, distinct=True)
    assert counts.equal == count
    calls = calls_of(client)
    # Each call of the script looks too, so that what is more was looked up in vain.
    assert calls["mget"] - calls["evalsha"] < 20


@pytest.mark.parametrize("stranger", ["a hash", "a short text"])
def test_a_foreign_key_among_equal_rows_is_found(url: str, client: redis.Redis, stranger: str) -> None:
    """MGET shows a key of another type as absent: the script, which sees the row next, names it."""
    target = target_of(url)
    write_batches(iter([rows_of(5_000)]), target, distinct=True)
    name = codec.redis_key(target.prefix, b"4000").decode()
    client.delete(name)
    client.hset(name, "field", "value") if stranger == "a hash" else client.set(name, "hello")
    with pytest.raises(SparkFSError, match="4000") as caught:
        write_batches(iter([rows_of(5_000)]), target, distinct=True)
    assert caught.value.code == "SFS-610"


def test_a_lost_row_among_equal_ones_is_written(url: str, client: redis.Redis) -> None:
    """What a look finds absent is written."""
    target = target_of(url)
    write_batches(iter([rows_of(5_000)]), target, distinct=True)
    client.delete(codec.redis_key(target.prefix, b"4000"))
    counts = write_batches(iter([rows_of(5_000)]), target, distinct=True)
    assert (counts.applied, counts.equal) == (1, 4_999)
    assert stored(client, b"4000", target) == [4000, None]
