"""The pace of a writer with a budget: its arithmetic, by a clock that only sleeping and calls move on."""

from __future__ import annotations

import pytest

from spark_fs.online.pace import CALL_ROWS, Pace, call_rows


class Clock:
    """Time as the pace sees it."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def send(pace: Pace, clock: Clock, calls: int, *, rows: int = 100, trip: float = 0.0002) -> float:
    """So many calls, each of which takes ``trip`` seconds; gives the rows per second."""
    began = clock.now
    for _ in range(calls):
        with pace.call(rows):
            clock.now += trip
    seconds = clock.now - began
    return calls * rows / seconds if seconds else float("inf")


def paced(rows_per_second: float) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(rows_per_second, clock=clock, sleep=clock.sleep), clock


@pytest.mark.parametrize("budget", [50, 5_000, 100_000])
def test_the_budget_is_kept_and_used(budget: int) -> None:
    """However long a single call takes, as long as calls could be quicker than the budget, the rate is the budget's."""
    pace, clock = paced(budget)
    assert send(pace, clock, 2_000, rows=call_rows(budget)) == pytest.approx(budget, rel=0.01)
    assert pace.share == 1.0


def test_what_was_not_used_is_made_up_for_a_tenth_of_a_second_only() -> None:
    """After a pause, however long, a tenth of a second's rows go at once, and no more."""
    pace, clock = paced(10_000)
    send(pace, clock, 10)
    clock.now += 60
    began = clock.now
    send(pace, clock, 10, trip=0.0)
    assert clock.now == began
    send(pace, clock, 10, trip=0.0)
    assert clock.now - began == pytest.approx(0.1, abs=0.011)


def test_the_first_calls_are_no_burst() -> None:
    """Nothing is saved up before the writer begins: many tasks that start at once keep to the budget."""
    pace, clock = paced(1_000)
    began = clock.now
    send(pace, clock, 11, rows=50, trip=0.0)
    assert clock.now - began == pytest.approx(0.5)


def test_a_slow_server_is_written_to_more_slowly_and_never_not_at_all() -> None:
    """While calls take five times the usual, the rate halves again and again, down to a sixteenth of the budget."""
    pace, clock = paced(10_000)
    send(pace, clock, 200)
    send(pace, clock, 12, trip=0.001)
    assert pace.share < 1
    send(pace, clock, 100, trip=0.001)
    assert pace.share == 1 / 16
    assert send(pace, clock, 100, trip=0.001) == pytest.approx(10_000 / 16, rel=0.02)


def test_the_pace_is_regained_gradually() -> None:
    """Once the server is quick again the rate rises step by step to the budget."""
    pace, clock = paced(10_000)
    send(pace, clock, 200)
    send(pace, clock, 200, trip=0.001)
    shares = []
    for _ in range(20):
        send(pace, clock, 10)
        shares.append(pace.share)
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == 1.0


def test_single_slow_answers_change_nothing() -> None:
    """One call in four may take a hundred times as long: it is the usual call that counts."""
    pace, clock = paced(10_000)
    for _ in range(100):
        send(pace, clock, 3)
        send(pace, clock, 1, trip=0.02)
    assert pace.share == 1.0


def test_small_calls_are_not_slow_ones() -> None:
    """The last call of a batch has few rows, and its time is that of the trip."""
    pace, clock = paced(10_000)
    send(pace, clock, 100, rows=100, trip=0.0003)
    send(pace, clock, 100, rows=2, trip=0.0001)
    send(pace, clock, 100, rows=100, trip=0.0003)
    assert pace.share == 1.0


@pytest.mark.parametrize(("budget", "rows"), [(0.5, 1), (19, 1), (40, 2), (1_000, 50), (2_000, CALL_ROWS), (1e6, CALL_ROWS)])
def test_calls_of_a_small_budget_are_small(budget: float, rows: int) -> None:
    """At least twenty calls a second, so that a small budget too is spent evenly."""
    assert call_rows(budget) == rows


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_a_budget_of_nothing_is_refused(budget: float) -> None:
    """It would never end."""
    with pytest.raises(ValueError, match="no budget"):
        Pace(budget)
