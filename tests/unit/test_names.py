"""What online requests are resolved to is remembered for a moment, and not for longer."""

from __future__ import annotations

import pytest

from spark_fs import names
from spark_fs.names import RecentRequests
from spark_fs.spec import Selection, select
from tests.online.servers import view_of


def counting() -> tuple[RecentRequests, list[object]]:
    """Requests that note each time they are resolved anew."""
    asked: list[object] = []

    def anew(features: object) -> list[Selection]:
        asked.append(features)
        return [select(view_of())]

    return RecentRequests(anew), asked


def test_a_request_is_resolved_once_within_the_time() -> None:
    """Lists, tuples and names of services; the selections are the very same ones, which readers prepare once."""
    requests, asked = counting()
    first = requests.resolve(["weather:n", "weather:s"])
    assert requests.resolve(("weather:n", "weather:s"))[0] is first[0]
    assert requests.resolve("service")[0] is not first[0]
    assert requests.resolve(["weather:s", "weather:n"])[0] is not first[0]
    assert asked == [["weather:n", "weather:s"], "service", ["weather:s", "weather:n"]]


def test_after_the_time_or_an_apply_it_is_resolved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """``forget`` is for what this store applies itself."""
    requests, asked = counting()
    requests.resolve("service")
    requests.forget()
    requests.resolve("service")
    assert len(asked) == 2
    monkeypatch.setattr(names, "RECENT_SECONDS", 0.0)
    requests.resolve("service")
    assert len(asked) == 3


def test_many_different_requests_take_no_memory_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound all are forgotten."""
    monkeypatch.setattr(names, "_MOST_REQUESTS", 10)
    requests, asked = counting()
    for number in range(25):
        requests.resolve(f"service{number}")
    assert len(requests._found) <= 10
    assert len(asked) == 25
