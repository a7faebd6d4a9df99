"""Writing under a budget, to a real server: how fast, in which calls, and what becomes of it when the server is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

from spark_fs.errors import InvalidError
from spark_fs.online.redis_store import OnlineTarget, bury_batches, write_batches
from tests.online.proxy import proxy_to
from tests.online.servers import batch, target_of

KEYS = [b"%d" % number for number in range(6_000)]


def calls_of(client: redis.Redis) -> dict[str, int]:
    """How often each command was called, since the server began to count."""
    stats: dict[str, Any] = client.info("commandstats")  # type: ignore[assignment]
    return {name.removeprefix("cmdstat_"): found["calls"] for name, found in stats.items()}


def timed(target: OnlineTarget, keys: list[bytes], *, distinct: bool = True) -> float:
    """Rows per second of a write that must write all of them anew."""
    rows = batch(keys, n=range(len(keys)))
    began = time.monotonic()
    assert write_batches(iter([rows]), target, distinct=distinct).applied == len(keys)
    return len(keys) / (time.monotonic() - began)


@pytest.mark.parametrize("distinct", [True, False], ids=["insert", "script"])
def test_the_budget_bounds_what_is_written(url: str, client: redis.Redis, distinct: bool) -> None:
    """By either way of writing all rows arrive, in small calls, at the budget and hardly below; without one at once."""
    client.config_resetstat()
    assert timed(target_of(url, max_rows_per_second=5_000), KEYS, distinct=distinct) == pytest.approx(5_000, rel=0.2)
    assert client.dbsize() == len(KEYS)
    calls = calls_of(client)
    assert calls.get("msetnx", 0) + calls.get("evalsha", 0) >= len(KEYS) / 100
    client.flushall()
    assert timed(target_of(url), KEYS, distinct=distinct) > 15_000


def test_a_small_budget_is_spent_evenly(url: str) -> None:
    """Twenty calls a second, however few rows they have."""
    assert timed(target_of(url, max_rows_per_second=100), KEYS[:100]) == pytest.approx(100, rel=0.2)


def test_tombstones_are_rows_too(url: str) -> None:
    """What is withdrawn is written under the same budget."""
    target = replace(target_of(url, max_rows_per_second=2_000), generation=2, restating=True)
    began = time.monotonic()
    assert bury_batches(iter([batch(KEYS[:1_000])]), target).applied == 1_000
    assert time.monotonic() - began > 0.4


@contextmanager
def busy(url: str) -> Iterator[None]:
    """Somebody else keeps the server busy: each of their scripts holds it up for some milliseconds, one after the other."""
    ended = threading.Event()

    def work() -> None:
        with redis.Redis.from_url(url) as other:
            while not ended.is_set():
                other.eval("for i = 1, 600000 do local x = i % 7 end", 0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def stepwise(seconds: list[float]) -> Iterator[Any]:
    """Batches of 500 new rows, for ever; notes when each is asked for."""
    number = 0
    while True:
        seconds.append(time.monotonic())
        yield batch([b"%d" % key for key in range(number, number + 500)])
        number += 500


def test_a_busy_server_is_written_to_more_slowly(url: str) -> None:
    """While others keep the server busy the rate falls far below the budget, and comes back when they have ended."""
    asked: list[float] = []

    def rate(since: float, until: float) -> float:
        return 500 * sum(since <= moment < until for moment in asked) / (until - since)

    rates: dict[str, float] = {}

    def rows() -> Iterator[Any]:
        source, began = stepwise(asked), time.monotonic()
        while time.monotonic() - began < 3:
            yield next(source)
        rates["before"] = rate(began + 1, began + 3)
        with busy(url):
            began = time.monotonic()
            while time.monotonic() - began < 4:
                yield next(source)
            rates["while busy"] = rate(began + 2, began + 4)
        began = time.monotonic()
        while rates.get("after", 0) < 0.8 * rates["before"] and time.monotonic() - began < 20:
            yield next(source)
            rates["after"] = rate(time.monotonic() - 1, time.monotonic())

    write_batches(rows(), target_of(url, max_rows_per_second=10_000), distinct=True)
    assert 2_500 < rates["before"] < 11_000, rates
    assert 0 < rates["while busy"] < 0.4 * rates["before"], rates
    assert rates["after"] > 0.8 * rates["before"], rates


def test_an_even_delay_is_no_slowness(url: str) -> None:
    """A link on which each call takes 2 ms from the start is what is usual there: the budget is used."""
    with proxy_to(url) as proxy:
        proxy.delay_seconds = 0.001
        assert timed(target_of(proxy.url, max_rows_per_second=10_000), KEYS) > 8_000


def test_a_negative_budget_is_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidError) as caught:
        target_of("redis://localhost", max_rows_per_second=-1)
    assert caught.value.problems[0].code == "SFS-629"
