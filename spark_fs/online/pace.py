"""How fast a writer may go: a budget of rows a second, and less than that while the server answers slowly.

A writer with a budget waits for each answer before it sends the next call, so that what readers have to wait for is one
short call, and the time of a call is that of the server and the network alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Rows and bytes of a call of a writer with a budget. A row takes the server about 2 µs, in which it serves nobody else.
CALL_ROWS, CALL_BYTES = 100, 64 * 1024
#: So many calls a second at least: of a small budget the calls have fewer rows.
_CALLS_A_SECOND = 20
#: What was not used of the budget for so long, while rows were read and encoded, may be used later.
_CATCH_UP_SECONDS = 0.1
#: A call without rows takes about as long as so many rows do.
_ROWS_OF_A_TRIP = 50
#: The pace is judged after so many calls, and so many seconds.
_JUDGED_CALLS, _JUDGED_SECONDS = 5, 0.1
#: The server is slow when a call takes so many times the least that was usual before.
_SLOW = 4.0
#: Halved while the server is slow, down to this share of the budget; regained by this factor.
_LEAST_SHARE, _REGAIN = 1 / 16, 1.5


def call_rows(rows_per_second: float) -> int:
    """The most rows of a call under this budget: 1 to ``CALL_ROWS``."""
    return max(1, min(CALL_ROWS, int(rows_per_second / _CALLS_A_SECOND)))


class Pace:
    """The pace of one writer.

    ``rows_per_second`` (above 0) is kept on average, and over any time but for a tenth of a second's rows. ``share`` is what
    part of it is used now, from 1/16 to 1. The usual time of a call is a median over some calls, so that single slow answers
    count for nothing; it is compared with the least of this writer, which knows of no better times before its own.
    """

    def __init__(
        self,
        rows_per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not rows_per_second > 0:
            raise ValueError(f"{rows_per_second} rows a second is no budget")
        self.share = 1.0
        self._rows_per_second, self._clock, self._sleep = rows_per_second, clock, sleep
        #: When the next call may begin; and since when the answers in ``_trips`` have come.
        self._due = self._since = clock()
        self._trips: list[float] = []
        self._least = float("inf")

    @contextmanager
    def call(self, rows: int) -> Iterator[None]:
        """Wait until so many rows may be sent; the block sends them and waits for the answer."""
        now = self._clock()
        self._due = max(self._due, now - _CATCH_UP_SECONDS)
        if self._due > now:
            self._sleep(self._due - now)
        self._due += rows / (self._rows_per_second * self.share)
        began = self._clock()
        yield
        self._judge((self._clock() - began) / (rows + _ROWS_OF_A_TRIP))

    def _judge(self, trip: float) -> None:
        self._trips.append(trip)
        now = self._clock()
        if len(self._trips) < _JUDGED_CALLS or now - self._since < _JUDGED_SECONDS:
            return
        usual = statistics.median(self._trips)
        is_slow = usual > _SLOW * self._least
        self.share = max(_LEAST_SHARE, self.share / 2) if is_slow else min(1.0, self.share * _REGAIN)
        self._least = min(self._least, usual)
        self._trips, self._since = [], now
