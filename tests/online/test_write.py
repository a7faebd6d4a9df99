"""The contract of the guarded write, held by every server it runs against."""

from __future__ import annotations

import pickle
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark_fs.errors import InvalidError, SparkFSError, UnavailableError, translate
from spark_fs.online import calls, codec, connect, redis_store
from spark_fs.online.connect import check_server, delete_prefix
from spark_fs.online.read import OnlineReader
from spark_fs.online.redis_store import OnlineTarget, WriteCounts, bury_batches, write_batches
from spark_fs.online.script import SCRIPT
from spark_fs.spec import Column, select
from spark_fs.types import Bytes, Int64
from tests.online.servers import FEATURES, NOON, UTC, batch, free_port, ping_for_ever, redis_process, target_of, view_of

HOUR = timedelta(hours=1)
DECODE = codec.Decoder(FEATURES).decode


def write(target: OnlineTarget, *batches: pa.RecordBatch) -> WriteCounts:
    return write_batches(iter(batches), target)


def stored(client: redis.Redis, target: OnlineTarget, key: bytes) -> list[Any] | None:
    value: Any = client.get(codec.redis_key(target.prefix, key))
    return None if value is None else DECODE(value)


# ---- which row wins


def test_newer_equal_and_stale_rows_are_told_apart(url: str, client: redis.Redis) -> None:
    """Only a greater version is written; the counts say what became of each row."""
    target = target_of(url)
    first = batch([b"JFK", b"LGA"], n=[1, 2], s=["a", None])
    again = [write(target, first), write(target, first)]
    assert [(counts.applied, counts.equal, counts.stale) for counts in again] == [(2, 0, 0), (0, 2, 0)]
    mixed = write(target, batch([b"JFK", b"LGA", b"EWR"], [NOON - HOUR, NOON + HOUR, NOON], n=[7, 8, 9]))
    assert (mixed.applied, mixed.equal, mixed.stale, mixed.rows) == (2, 0, 1, 3)
    assert stored(client, target, b"JFK") == [1, "a"]
    assert stored(client, target, b"LGA") == [8, None]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"events": NOON}, {"events": NOON + timedelta(microseconds=1)}),
        ({"events": datetime(1969, 12, 31, tzinfo=UTC)}, {"events": datetime(1970, 1, 2, tzinfo=UTC)}),
        ({"events": datetime(1900, 1, 1, tzinfo=UTC)}, {"events": datetime(9999, 12, 31, tzinfo=UTC)}),
        ({"created": None}, {"created": NOON}),
        ({"created": NOON}, {"created": NOON + timedelta(microseconds=1)}),
        ({"builds": 9}, {"builds": 10}),
        ({"builds": 2**31}, {"builds": 2**32 - 1}),
        ({"builds": 9}, {"events": NOON + timedelta(microseconds=1), "builds": 1}),
        ({"builds": 9}, {"created": NOON, "builds": 1}),
    ],
)
def test_the_greater_version_stays_in_either_order(
    url: str, client: redis.Redis, older: dict[str, Any], newer: dict[str, Any]
) -> None:
    """(event time, created time, build) decide in this order, as exact numbers; a null created time is least."""
    target = target_of(url)
    low, high = batch([b"a"], n=[1], **older), batch([b"a"], n=[2], **newer)
    assert [write(target, rows).applied for rows in (low, high)] == [1, 1]
    assert write(target, low).stale == 1
    assert stored(client, target, b"a") == [2, None]


def test_a_restatement_replaces_newer_rows(url: str, client: redis.Redis) -> None:
    """A greater generation wins over any event time, on purpose only, and what began before it cannot come back."""
    target = target_of(url)
    later = replace(target, generation=2)
    write(target, batch([b"a"], NOON, n=[1]))
    assert write(later, batch([b"a"], NOON - HOUR, n=[2])).stale == 1
    restating = replace(later, restating=True)
    assert [write(restating, batch([b"a"], NOON - HOUR, n=[2])).applied for _ in range(2)] == [1, 0]
    again = write(target, batch([b"a"], NOON, n=[1]))
    assert (again.fenced, again.rows) == (1, 1)
    assert write(target, batch([b"a"], NOON - 2 * HOUR, n=[0])).stale == 1
    assert stored(client, target, b"a") == [2, None]
    assert write(later, batch([b"a"], NOON - HOUR, builds=2, n=[3])).applied == 1
    assert stored(client, target, b"a") == [3, None]


def test_an_older_restatement_does_not_replace_a_later_one(url: str, client: redis.Redis) -> None:
    """Of two restatements the later one stays, in whatever order they arrive."""
    second, third = (replace(target_of(url), generation=number, restating=True) for number in (2, 3))
    write(third, batch([b"a"], NOON, n=[3]))
    assert write(second, batch([b"a"], NOON - HOUR, n=[2])).stale == 1
    assert write(second, batch([b"a"], NOON + HOUR, n=[2])).fenced == 1
    assert stored(client, third, b"a") == [3, None]


@pytest.mark.parametrize("ttl", [None, timedelta(days=365_000)])
def test_a_tombstone_keeps_out_what_began_before_it(url: str, client: redis.Redis, ttl: timedelta | None) -> None:
    """A buried key reads as absent, whatever retries bring; the next run of the view may write it again."""
    target = target_of(url, view_of(ttl=ttl))
    rows = batch([b"a", b"b"], NOON, n=[1, 2])
    write(target, rows)
    restating = replace(target, generation=2, restating=True)
    for expected in ((2, 0), (0, 2)):
        counts = bury_batches(iter([batch([b"a", b"absent"])]), restating)
        assert (counts.applied, counts.equal) == expected
    name: bytes = codec.redis_key(target.prefix, b"a")
    assert client.get(name) == codec.tombstone(2)
    assert 0 < client.ttl(name) <= codec.GRAVE.total_seconds()  # type: ignore[operator]
    counts = write(target, rows)
    assert (counts.fenced, counts.equal) == (1, 1)
    assert client.get(name) == codec.tombstone(2)
    assert write(replace(target, generation=2), rows).applied == 1
    assert stored(client, target, b"a") == [1, None]
    assert client.ttl(name) == -1 if ttl is None else client.ttl(name) > 300_000 * 86_400  # type: ignore[operator]


def test_what_is_erased_stays_so(url: str, client: redis.Redis) -> None:
    """No generation replaces an erased key, and writers that know of it do not send it."""
    target = target_of(url)
    for generation in (codec.ERASED, codec.ERASED - 1):
        bury_batches(iter([batch([b"a"])]), replace(target, generation=generation, restating=True))
    assert write(replace(target, generation=7, restating=True), batch([b"a"], n=[1])).fenced == 1
    known = replace(target, erased=frozenset([codec.key_digest(target.key_space, b"a")]))
    counts = write(known, batch([b"a", b"b"], n=[1, 2]))
    assert (counts.rows, counts.applied) == (1, 1)
    assert stored(client, target, b"b") == [2, None]
    assert client.get(codec.redis_key(target.prefix, b"a")) == codec.tombstone(codec.ERASED)


def test_a_row_past_its_ttl_opens_no_grave(url: str, client: redis.Redis) -> None:
    """Rows that are too old leave a tombstone where it was, and a restatement leaves one: else older rows came back."""
    now = datetime.now(UTC)
    target = replace(target_of(url, view_of(ttl=HOUR)), generation=2)
    restating = replace(target, restating=True)
    fresh, old = batch([b"a", b"b"], now, n=[1, 2]), batch([b"a", b"b"], now - 2 * HOUR, n=[3, 4])
    write(replace(target, generation=1), fresh)
    bury_batches(iter([batch([b"a"])]), restating)
    assert write(target, old.slice(0, 1)).expired == 1
    assert write(restating, old.slice(1)).expired == 1
    assert write(replace(target, generation=1), fresh).fenced == 2
    assert client.mget([codec.redis_key(target.prefix, key) for key in (b"a", b"b")]) == [codec.tombstone(2)] * 2


@pytest.mark.parametrize("ttl", [None, timedelta(days=365_000)])
def test_a_key_many_times_in_one_call_ends_with_its_greatest_version(
    url: str, client: redis.Redis, ttl: timedelta | None
) -> None:
    """Rows of one key in the same call are compared with each other, whatever their order."""
    target = target_of(url, view_of(ttl=ttl))
    events = [NOON + HOUR, NOON + 2 * HOUR, NOON, NOON + 2 * HOUR]
    counts = write(target, batch([b"a"] * 4, events, builds=[1, 1, 5, 2], n=[1, 2, 3, 4]))
    assert (counts.applied, counts.stale) == (3, 1)
    assert stored(client, target, b"a") == [4, None]


ROWS = st.tuples(st.sampled_from([b"a", b"b", b"{c}"]), st.integers(0, 3), st.integers(0, 2), st.integers(1, 3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROWS, min_size=1, max_size=12), st.data())
def test_writes_commute_and_may_repeat(server_url: str, rows: list[tuple[bytes, int, int, int]], data: st.DataObject) -> None:
    """Any order, split and repetition of the same rows leaves the same store: the greatest version of each key."""
    shuffled = data.draw(st.permutations(rows)) + data.draw(st.lists(st.sampled_from(rows), max_size=6))
    cut = data.draw(st.integers(0, len(shuffled)))
    target = replace(target_of(server_url), prefix=b"algebra:%b@1:" % uuid.uuid4().hex.encode())
    parts = [
        batch(
            [key for key, _, _, _ in part],
            [NOON + hour * HOUR for _, hour, _, _ in part],
            created=[None if created == 0 else NOON + created * HOUR for _, _, created, _ in part],
            builds=[build for _, _, _, build in part],
            n=[hour * 100 + created * 10 + build for _, hour, created, build in part],
        )
        for part in (shuffled[:cut], shuffled[cut:])
    ]
    assert write(target, *parts).rows == len(shuffled)
    with redis.Redis.from_url(server_url) as client:
        for key in {row[0] for row in rows}:
            _, hour, created, build = max(row for row in rows if row[0] == key)
            assert stored(client, target, key) == [hour * 100 + created * 10 + build, None]


def test_four_writers_at_once_end_with_the_newest(url: str, client: redis.Redis) -> None:
    """Concurrent writers of overlapping rows lose nothing and bring nothing old back."""
    target, keys = target_of(url), [b"%d" % i for i in range(800)]
    failures: list[BaseException] = []

    def writer(first: int) -> None:
        try:
            for turn in range(first, 40, 4):
                hour = (turn * 17) % 40  # each hour once, neither rising nor falling
                write(target, batch(keys, NOON + hour * HOUR, n=[hour] * len(keys)))
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {stored(client, target, key)[0] for key in keys} == {39}  # type: ignore[index]


PLANTED = {
    "an equal version is written again": (b"if order > 0 then", b"if order >= 0 then"),
    "an older version is written": (b"if order > 0 then", b"if order ~= 0 then"),
    "the build is not looked at": (b"or a5 - b5", b"or 0"),
    "the generation is not looked at": (b"raised = a0 - b0", b"raised = 0"),
    "every write restates": (b"raised > 0 and restating", b"raised > 0"),
    "the low half of a time is dropped": (b"a2 ~= b2 and", b"false and"),
    "a tombstone never ends": (b"'PX', string.format('%.0f', ms))", b"'KEEPTTL')"),
    "a restated row ends with its ttl": (b"restating and grave_ms or", b""),
    "a row that replaces a restated one ends its fence": (b"or fences[key] or 0", b"or 0"),
    "rows of one call do not see each other": (b"winner[key] or stored[i]", b"stored[i]"),
    "foreign keys are overwritten": (b"#absent > 0 and", b"false and"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_contract_catches_planted_bugs(url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Each of these mistakes in the script breaks a rule above, so the suite would see it."""
    right, wrong = PLANTED[bug]
    assert SCRIPT.count(right) == 1
    script = SCRIPT.replace(right, wrong)
    call = b"$4\r\nEVAL\r\n$%d\r\n%b\r\n" % (len(script), script)
    monkeypatch.setattr(calls, "_BY_HASH", call)
    rules: list[Any] = [
        lambda: test_newer_equal_and_stale_rows_are_told_apart(url, client),
        lambda: test_the_greater_version_stays_in_either_order(url, client, {"builds": 9}, {"builds": 10}),
        lambda: test_the_greater_version_stays_in_either_order(
            url, client, {"events": NOON}, {"events": NOON + timedelta(microseconds=1)}
        ),
        lambda: test_a_restatement_replaces_newer_rows(url, client),
        lambda: test_a_tombstone_keeps_out_what_began_before_it(url, client, None),
        lambda: test_a_key_many_times_in_one_call_ends_with_its_greatest_version(url, client, None),
        lambda: test_a_key_of_another_program_is_left_alone(url, client),
        lambda: test_what_was_restated_keeps_out_older_writers_after_its_ttl(url, client, "nothing"),
        lambda: test_what_was_restated_keeps_out_older_writers_after_its_ttl(url, client, "a newer row"),
    ]
    caught = 0
    for rule in rules:
        client.flushall()
        try:
            rule()
        except (AssertionError, pytest.fail.Exception):
            caught += 1
    assert caught > 0


# ---- calls and retries


def test_batches_of_any_size_are_cut_into_calls(url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, bytes per call and pieces of encoding may fall anywhere: every row arrives once and intact."""
    monkeypatch.setattr(redis_store, "ENCODE_BYTES", 30_000)
    monkeypatch.setattr(redis_store, "CALL_BYTES", 2_000)
    target, keys = target_of(url), [b"%d" % i for i in range(3_001)]
    texts = ["x" * (i % 700) for i in range(3_001)]
    counts = write(target, batch([]), batch(keys, n=list(range(3_001)), s=texts))
    assert (counts.applied, counts.rows) == (3_001, 3_001)
    names = [codec.redis_key(target.prefix, key) for key in keys]
    values: Any = client.mget(names)
    assert [DECODE(value) for value in values] == [[i, text] for i, text in enumerate(texts)]
    assert counts.bytes == sum(map(len, names)) + sum(map(len, values))


def test_a_lost_script_is_loaded_again(url: str, client: redis.Redis) -> None:
    """SCRIPT FLUSH, or a server that never saw the script, costs one more try of the calls it hits, no row."""
    target = target_of(url)

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(20):
            client.script_flush()
            yield batch([b"%d" % i for i in range(number * 100, number * 100 + 100)], n=range(100))

    assert write_batches(batches(), target).applied == 2_000
    assert len(client.keys(target.prefix + b"*")) == 2_000


def test_a_cut_connection_is_made_again(url: str, client: redis.Redis) -> None:
    """A connection lost in the middle is made again and what was not confirmed sent again; no row is lost."""
    target, killed = target_of(url), 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal killed
        for number in range(10):
            if number % 3 == 2:
                peers = [peer["id"] for peer in client.client_list() if peer["cmd"].startswith("eval")]
                killed += sum(client.client_kill_filter(_id=peer) for peer in peers)
            yield batch([b"%d" % i for i in range(number * 100, number * 100 + 100)], n=range(100))

    counts = write_batches(batches(), target)
    assert killed > 0
    assert counts.rows == counts.applied + counts.equal == 1_000
    assert len(client.keys(target.prefix + b"*")) == 1_000


def test_a_busy_server_is_waited_for(tmp_path: Path) -> None:
    """While somebody's slow script holds the server, the write waits within its limits, then goes on."""
    with redis_process(tmp_path, "--busy-reply-threshold", "50") as url:

        def hog() -> None:
            slow = "local t = redis.call('TIME'); local e = t[1] * 1000 + t[2] / 1000 + 1500;" + (
                " repeat t = redis.call('TIME') until t[1] * 1000 + t[2] / 1000 > e; return 1"
            )
            with redis.Redis.from_url(url) as other:
                other.eval(slow, 0)

        thread = threading.Thread(target=hog)
        thread.start()
        with pytest.raises(redis.ResponseError, match="BUSY"):
            ping_for_ever(url)
        assert write(target_of(url), batch([b"a"], n=[1])).applied == 1
        thread.join()


def test_a_read_only_server_is_waited_for(tmp_path: Path) -> None:
    """A master that has just become a replica refuses writes; the write waits until one takes them again."""
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.replicaof("127.0.0.1", "1")
        promote = threading.Timer(0.5, lambda: client.replicaof("NO", "ONE"))
        promote.start()
        assert write(target_of(url), batch([b"a"], n=[1])).applied == 1
        promote.join()
        assert int(client.info("errorstats")["errorstat_READONLY"]["count"]) > 0  # type: ignore[index]


def test_tls(tmp_path: Path) -> None:
    """rediss:// encrypts and checks the server's certificate; without its authority nothing is sent."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *request, *files], check=True, capture_output=True)
    port = str(free_port())
    options = ["--tls-port", port, "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"]
    with redis_process(tmp_path, *options):
        secure = f"rediss://127.0.0.1:{port}/0"
        assert write(target_of(f"{secure}?ssl_ca_certs={certificate}"), batch([b"a"], n=[1])).applied == 1
        with pytest.raises(InvalidError, match="SFS-631"):
            check_server(secure)


# ---- expiry


def test_expiry_is_event_time_plus_ttl(url: str, client: redis.Redis) -> None:
    """Redis drops a row once its ttl has passed since its event, never earlier; a replay does not prolong it."""
    target = target_of(url, view_of(ttl=timedelta(hours=2)))
    event = datetime.now(UTC).replace(microsecond=654_321) - HOUR
    for _ in range(2):
        write(target, batch([b"a"], event, n=[1]))
    expires_ms: Any = client.execute_command("PEXPIRETIME", codec.redis_key(target.prefix, b"a"))
    exact_ms = (event.timestamp() + 7200) * 1000
    assert exact_ms <= expires_ms <= exact_ms + 2


def test_a_row_without_ttl_never_expires(url: str, client: redis.Redis) -> None:
    """No ttl, no expiry, however old the row."""
    target = target_of(url)
    write(target, batch([b"a"], datetime(1900, 1, 1, tzinfo=UTC), n=[1]))
    assert client.ttl(codec.redis_key(target.prefix, b"a")) == -1


def test_rows_past_their_ttl_are_counted_and_not_kept(url: str, client: redis.Redis) -> None:
    """A row that is already too old is not written; a newer row of its key is, in the same call or later."""
    target = target_of(url, view_of(ttl=HOUR))
    now = datetime.now(UTC)
    counts = write(target, batch([b"a", b"b", b"b"], [now - 2 * HOUR, now - 2 * HOUR, now], n=[1, 2, 3]))
    assert (counts.expired, counts.applied, counts.rows) == (2, 1, 3)
    assert stored(client, target, b"a") is None
    assert stored(client, target, b"b") == [3, None]


# ---- what is refused


def test_a_key_of_another_program_is_left_alone(url: str, client: redis.Redis) -> None:
    """A key that holds a hash, or text shorter than a header, is named and nothing of the call is written."""
    target = target_of(url)
    foreign = codec.redis_key(target.prefix, b"bad\n\xff")
    for plant in (lambda: client.hset(foreign, "x", "1"), lambda: client.set(foreign, "short")):
        client.delete(foreign)
        plant()
        with pytest.raises(InvalidError, match=r"SFS-610.*'bad\\n\\xff'"):
            write(target, batch([b"good", b"bad\n\xff"], n=[1, 2]))
        assert client.exists(codec.redis_key(target.prefix, b"good")) == 0


def test_odd_keys_are_kept_apart(url: str, client: redis.Redis) -> None:
    """Braces, NUL, line ends, wildcards, 64 KB and the empty key are keys like any other."""
    target = target_of(url)
    keys = [b"", b"{", b"}{", b"a\x00b", b"a\r\nb", b"*", "é".encode(), "e\u0301".encode(), b"k" * 65_536]
    assert write(target, batch(keys, n=range(len(keys)))).applied == len(keys)
    assert [stored(client, target, key) for key in keys] == [[i, None] for i in range(len(keys))]


@pytest.mark.parametrize(("key", "size"), [(b"wide", 600_000), (b"k" * 600_000, 1)])
def test_oversized_rows_are_refused_before_they_are_sent(url: str, client: redis.Redis, key: bytes, size: int) -> None:
    """A key or value above 512 KB would hold up all readers; the error names the entity."""
    features = (Column("blob", Bytes),)
    target = target_of(url, view_of(features=features))
    with pytest.raises(InvalidError, match=r"SFS-608.*'(wide|kkk)"):
        write(target, batch([key], features=features, blob=[b"x" * size]))
    assert client.dbsize() == 0


def test_a_full_server_fails_the_write_and_keeps_what_it_has(tmp_path: Path) -> None:
    """Without memory a call is refused as a whole; reads go on, and after more memory the same write ends well."""
    features = (Column("blob", Bytes),)
    with redis_process(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 2_000_000)  # type: ignore[index]
        target = target_of(url, view_of(features=features))
        rows = batch([b"%d" % i for i in range(4_000)], features=features, blob=[b"x" * 1_000] * 4_000)
        with pytest.raises(redis.OutOfMemoryError) as caught:
            write(target, rows)
        assert "SFS-603" in str(translate(caught.value))
        kept: Any = client.dbsize()
        assert 0 < kept < 4_000
        client.config_set("maxmemory", 0)
        counts = write(target, rows)
        # Calls under way when the first was refused may have fitted after all.
        assert kept <= counts.equal < 4_000
        assert counts.equal + counts.applied == 4_000 == client.dbsize()


def test_a_wrong_password_is_told_at_once(url: str) -> None:
    """A refused login is no passing trouble: it is not retried, and no password is shown."""
    wrong = "redis://:not-it-4711@" + url.split("@")[1]
    began = time.monotonic()
    with pytest.raises(redis.AuthenticationError) as caught:
        write(target_of(wrong), batch([b"a"], n=[1]))
    assert time.monotonic() - began < 5
    assert "SFS-602" in str(translate(caught.value))
    with pytest.raises(InvalidError, match="SFS-602") as checked:
        check_server(wrong)
    assert "not-it-4711" not in f"{caught.value}{checked.value}{target_of(wrong)!r}"


def test_a_dead_server_is_given_up_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot be reached is tried a bounded number of times, then the error is clear."""
    monkeypatch.setattr(redis_store, "MAX_FAILURES", 3)
    dead = "redis://127.0.0.1:1/0"
    with pytest.raises(redis.ConnectionError) as caught:
        write(target_of(dead), batch([b"a"], n=[1]))
    assert "SFS-601" in str(translate(caught.value))
    with pytest.raises(UnavailableError, match="SFS-601"):
        check_server(dead)


@pytest.mark.parametrize("bad", ["localhost:6379", "http://x", "redis://user:pa/4711@host:6379", ""])
def test_a_malformed_url_is_refused_without_showing_it(bad: str) -> None:
    """What is wrong with a URL may be its password, so the text is not repeated."""
    with pytest.raises(InvalidError, match="SFS-614") as caught:
        check_server(bad)
    assert "4711" not in str(caught.value)
    assert caught.value.__cause__ is None


# ---- target, checks, removal


def test_a_target_travels_to_executors_and_hides_its_password() -> None:
    """A target is equal after pickling and shows no secret."""
    target = target_of("redis://u:s3cret@h:1/0", view_of(ttl=HOUR), generation=3)
    assert pickle.loads(pickle.dumps(target)) == target
    assert "s3cret" not in repr(target)
    assert target.prefix == b"flights:weather@1:"


def test_a_server_says_what_it_is(url: str) -> None:
    """The report names kind, version, policy and memory."""
    report = check_server(url)
    assert report.kind in ("redis", "valkey")
    assert int(report.version.split(".")[0]) >= 6
    assert (report.maxmemory_policy, report.max_bytes, report.mode) == ("noeviction", 0, "standalone")
    assert report.used_bytes > 0


def test_an_old_server_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server older than the commands of the script is told before anything is written."""
    monkeypatch.setattr(connect, "OLDEST_SERVER", (99, 0))
    with pytest.raises(InvalidError, match="SFS-604"):
        check_server(url)


def test_a_server_that_evicts_is_refused(tmp_path: Path) -> None:
    """Under a memory limit only noeviction is accepted: an evicted row looks like one that never was."""
    with redis_process(tmp_path, "--maxmemory", "100mb", "--maxmemory-policy", "volatile-ttl") as url:
        with pytest.raises(InvalidError, match=r"SFS-604.*volatile-ttl"):
            check_server(url)
        with redis.Redis.from_url(url) as client:
            client.config_set("maxmemory-policy", "noeviction")
        assert check_server(url).max_bytes == 100 * 1024 * 1024


def test_only_the_keys_of_one_view_version_are_removed(url: str, client: redis.Redis) -> None:
    """Removal takes all rows of a version and none of its neighbours, also where names hold wildcards."""
    prefixes = [b"p:v@1:", b"p:v@10:", b"p:v@11:", b"q:v@1:", b"p:*@1:"]
    for prefix in prefixes:
        write(replace(target_of(url), prefix=prefix), batch([b"a", b"{b}", b"*"], n=[1, 2, 3]))
    client.set("p:v@1:stranger", "x")
    assert delete_prefix(url, b"p:*@1:") == 3
    assert delete_prefix(url, b"p:v@1:") == 3
    assert client.dbsize() == 3 * 3 + 1
    for careless in (b"", b":", b"p:v@1"):
        with pytest.raises(ValueError, match="prefix"):
            delete_prefix(url, careless)


def test_unfit_rows_stop_the_write(url: str, client: redis.Redis) -> None:
    """A batch that lacks a feature is refused as a whole."""
    lacking = batch([b"a"], features=(Column("n", Int64),), n=[1])
    with pytest.raises(SparkFSError, match=r"SFS-609.*'s'"):
        write(target_of(url), lacking)
    assert client.dbsize() == 0


@pytest.mark.parametrize("then", ["nothing", "a newer row", "an expired row"])
def test_what_was_restated_keeps_out_older_writers_after_its_ttl(url: str, client: redis.Redis, then: str) -> None:
    """A task that began before cannot bring back what was there; also where the next row has replaced the restated one."""
    now = datetime.now(UTC)
    target = target_of(url, view_of(ttl=HOUR))
    newest = replace(target, generation=2)
    ends = now - HOUR + timedelta(milliseconds=600)
    assert write_batches(iter([batch([b"a"], ends, n=[1])]), replace(newest, restating=True)).applied == 1
    if then == "a newer row":
        assert write_batches(iter([batch([b"a"], ends + timedelta(milliseconds=1), n=[2])]), newest).applied == 1
    time.sleep(0.7)
    if then == "an expired row":
        assert write_batches(iter([batch([b"a"], ends + timedelta(milliseconds=1), n=[2])]), newest).expired == 1
    assert write_batches(iter([batch([b"a"], now, n=[3])]), target).fenced == 1
    with OnlineReader(url) as reader:
        response = reader.read([select(view_of(ttl=HOUR), ["n"])], {"origin": ["a"]})
    assert response.statuses["n"] in (["OUTSIDE_MAX_AGE"], ["NOT_FOUND"])
    assert write_batches(iter([batch([b"a"], now, n=[4])]), newest).applied == 1
    left_days = client.pttl(codec.redis_key(target.prefix, b"a")) / 86_400_000  # type: ignore[operator]
    assert 6.9 < left_days <= 7
