"""Writes and reads over a network that loses, delays and cuts; the server behind it is real."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import redis

from spark_fs.errors import UnavailableError
from spark_fs.online import codec, redis_store
from spark_fs.online.connect import check_server
from spark_fs.online.read import OnlineReader
from spark_fs.online.redis_store import write_batches
from spark_fs.spec import select
from tests.online.proxy import Proxy, proxy_to
from tests.online.servers import FEATURES, NOON, batch, target_of, view_of

HOUR = timedelta(hours=1)
KEYS = [b"%d" % number for number in range(3_000)]
DECODE = codec.Decoder(FEATURES).decode


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    """A proxy to the running, empty server."""
    with proxy_to(url) as between:
        yield between


def assert_stored(client: redis.Redis, values: list[int]) -> None:
    """Each key has its value, whatever happened on the way."""
    prefix = target_of("").prefix
    found = client.mget([codec.redis_key(prefix, key) for key in KEYS])
    assert [DECODE(value)[0] for value in found] == values  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(6))
def test_replies_that_never_arrive_cost_no_row_and_count_none_twice(proxy: Proxy, client: redis.Redis, seed: int) -> None:
    """The server has done the call, the connection is cut in its reply: it is sent again, and rows then count as equal."""
    # Of the login and of the first calls, in the middle of a reply too.
    proxy.cut_replies = [7 + seed, 20 + 10 * seed, 60, 13]
    rows = batch(KEYS, n=range(3_000))
    counts = write_batches(iter([rows.slice(start, 500) for start in range(0, 3_000, 500)]), target_of(proxy.url))
    assert proxy.cuts >= 2
    assert counts.rows == 3_000
    assert counts.applied + counts.equal == 3_000
    assert_stored(client, list(range(3_000)))
    again = write_batches(iter([rows]), target_of(proxy.url))
    assert (again.equal, again.rows) == (3_000, 3_000)


def test_every_reply_lost_in_turn_is_survived(proxy: Proxy, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection dies after one more reply than the last; as long as one is answered the write goes on."""
    monkeypatch.setattr(redis_store, "CALLS_IN_FLIGHT", 2)
    proxy.cut_replies = [50 + 5 * number for number in range(6)]
    write_batches(iter([batch(KEYS, NOON - HOUR, n=[-1] * 3_000)]), target_of(proxy.url))
    proxy.cut_replies = [70 + 3 * number for number in range(4)]
    counts = write_batches(iter([batch(KEYS, n=range(3_000))]), target_of(proxy.url))
    assert proxy.cuts >= 5
    assert counts.applied + counts.equal == counts.rows == 3_000
    assert_stored(client, list(range(3_000)))


def test_replies_in_single_bytes_are_matched_to_their_calls(proxy: Proxy, client: redis.Redis) -> None:
    """However replies are cut, the counts are those of the calls."""
    proxy.piece = 1
    small = KEYS[:40]
    older = batch(small[:20], NOON + HOUR, n=[9] * 20)
    write_batches(iter([older]), target_of(proxy.url))
    counts = write_batches(iter([batch([key], n=[1]) for key in small]), target_of(proxy.url))
    assert (counts.applied, counts.stale) == (20, 20)


def test_a_slow_link_is_slow_and_no_more(proxy: Proxy, client: redis.Redis) -> None:
    """50 ms a piece and 2 MB a second: no timeout, no retry, all rows there, and a reader waits for its own answer only."""
    proxy.delay_seconds, proxy.bytes_per_second = 0.05, 2e6
    counts = write_batches(iter([batch(KEYS, n=range(3_000), s=["x" * 100] * 3_000)]), target_of(proxy.url))
    assert (counts.applied, proxy.connections) == (3_000, 1)
    with OnlineReader(proxy.url) as reader:
        reader.read([select(view_of(), ["n"])], {"origin": ["0"]})
        began = time.monotonic()
        answer = reader.read([select(view_of(), ["n"])], {"origin": [str(n) for n in range(100)]})
        assert time.monotonic() - began < 1
    assert answer.to_dict()["n"] == list(range(100))


def test_a_link_that_swallows_everything_is_given_up_in_time(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused and nothing comes back: the error comes after the time limit and its tries, and names it."""
    monkeypatch.setattr(redis_store, "MAX_FAILURES", 2)
    proxy.swallow = True
    began = time.monotonic()
    with pytest.raises(redis.TimeoutError):
        write_batches(iter([batch([b"a"], n=[1])]), target_of(proxy.url, socket_timeout_seconds=0.3))
    with pytest.raises(UnavailableError, match="SFS-601"):
        check_server(proxy.url, socket_timeout_seconds=0.3)
    with OnlineReader(proxy.url, socket_timeout_seconds=0.3) as reader, pytest.raises(UnavailableError, match="SFS-601"):
        reader.read([select(view_of(), ["n"])], {"origin": ["0"]})
    assert time.monotonic() - began < 10


def test_a_link_that_goes_dead_in_the_middle_is_taken_up_again(proxy: Proxy, client: redis.Redis) -> None:
    """An open connection from which nothing comes any more; the next one is answered."""

    def batches() -> Iterator[object]:
        for start in range(0, 3_000, 500):
            if start == 1_000:
                proxy.swallow = True
            yield batch(KEYS[start : start + 500], n=range(start, start + 500))
            if start == 1_500:
                proxy.swallow = False

    counts = write_batches(batches(), target_of(proxy.url, socket_timeout_seconds=0.5))  # type: ignore[arg-type]
    assert counts.applied + counts.equal == counts.rows == 3_000
    assert_stored(client, list(range(3_000)))
