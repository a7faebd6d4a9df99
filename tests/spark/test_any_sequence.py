"""Whatever happens in whatever order, what is online after a run that says ok is what a dictionary says.

Hypothesis chooses builds, runs, backfills, restatements, refreshes, erasures, runs that are cut off, failovers and lost data,
and shortens what fails. The online store is a master with a replica that sentinels watch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from pyspark.sql import SparkSession

from spark_fs.errors import SparkFSError
from spark_fs.intervals import Interval
from spark_fs.materialize import materialize_view
from spark_fs.publication import Publication
from tests.online.topologies import Sentinels, eventually, sentinels
from tests.spark.test_materialize import END, HOUR, START, CutRegistry, against, online, put

HOURS, USERS = 4, range(3)
hours = st.integers(0, HOURS - 1)
users = st.sampled_from(USERS)
intervals = st.tuples(hours, hours).map(lambda pair: (min(pair), max(pair) + 1))
_folders = itertools.count()


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Sentinels]:
    (tmp_path / "servers").mkdir()
    with sentinels(tmp_path / "servers") as setup:
        yield setup


class Publishing(RuleBasedStateMachine):
    """The source, the table and what is published as dictionaries, beside the real ones."""

    def __init__(self, folder: Path, spark: SparkSession, setup: Sentinels) -> None:
        super().__init__()
        self.folder, self.setup = folder, setup
        setup.master.client.flushall()
        self.fs = against(folder, spark, setup.url)
        self.view = self.fs.registry.state().require_view("spend")
        self.source: dict[tuple[int, int], int] = {}
        self.table: dict[tuple[int, int], int] = {}
        #: Event hours that are published; those that a run has set out to publish which was cut off; erased users.
        self.published: set[int] = set()
        self.begun: set[int] = set()
        self.erased: set[int] = set()
        self.values = itertools.count(1)

    @initialize()
    def begin(self) -> None:
        self.source = {(user, 0): next(self.values) for user in USERS}
        self.build()

    # What happens at the source and in the table.

    @rule(user=users, hour=hours)
    def put_row(self, user: int, hour: int) -> None:
        self.source[user, hour] = next(self.values)

    @rule(user=users, hour=hours)
    def delete_row(self, user: int, hour: int) -> None:
        if len(self.source) > 1:
            self.source.pop((user, hour), None)

    @rule()
    def build(self) -> None:
        put(self.folder, [(user, START + hour * HOUR, value) for (user, hour), value in self.source.items()])
        self.fs.build(start=START, end=END)
        self.table = dict(self.source)

    # Runs. Each ends with the check.

    @rule()
    def incremental(self) -> None:
        self.run(lambda: self.fs.materialize_incremental(END), (0, HOURS))

    @rule(interval=intervals, everything=st.booleans())
    def backfill(self, interval: tuple[int, int], everything: bool) -> None:
        self.run(lambda: self.fs.materialize(*self.moments(interval), everything=everything), interval)

    @rule(interval=intervals)
    def restate(self, interval: tuple[int, int]) -> None:
        self.run(lambda: self.fs.materialize(*self.moments(interval), restate=True), interval, restated=set(range(*interval)))
        self.run(self.fs.repair, (0, 0))

    @rule(and_back=st.booleans())
    def refresh(self, and_back: bool) -> None:
        self.run(lambda: self.fs.materialize(START, END, full=True), (0, HOURS))
        if and_back and self.fs.registry.previous(self.view):
            self.fs.roll_back("spend")
            self.incremental()

    @rule(interval=intervals, full=st.booleans())
    def cut_off(self, interval: tuple[int, int], full: bool) -> None:
        """All is written, nothing is noted."""
        registry = CutRegistry(self.fs.environment.registry_url, self.fs.project)
        table, target = self.fs._offline.table(self.view), self.fs._target(self.view)
        try:
            materialize_view(registry, table, target, Interval(*self.moments(interval)), full=full)
        except InterruptedError:
            # That of an earlier run that was cut off, perhaps: it is finished first.
            plans = [Publication.from_json(intent.plan["todo"]) for intent in self.fs.registry.ledger.unfinished(self.view)]
            begun = [interval for plan in plans for interval in plan.intervals]
            self.begun = {hour for hour in range(HOURS) if any(each.start <= START + hour * HOUR < each.end for each in begun)}
        except SparkFSError as error:
            if error.code != "SFS-616":
                raise
        else:
            self.published |= self.begun | set(range(*interval))  # there was nothing to write
            self.begun = set()

    @rule(user=users, undo=st.booleans())
    def erase(self, user: int, undo: bool) -> None:
        self.fs.erase("spend", {"user_id": [user]}, undo=undo)
        if undo:
            self.erased.discard(user)
            self.run(lambda: self.fs.materialize(START, END, everything=True), (0, HOURS))
        else:
            self.erased.add(user)

    # What goes wrong.

    @rule()
    def fail_over(self) -> None:
        victim = self.setup.master
        victim.kill()
        eventually(lambda: self.setup.master is not victim, "another master")
        self.setup.heal()

    @rule()
    def lose_all(self) -> None:
        self.setup.master.client.flushall()

    # What must hold.

    def run(self, act: Callable[[], Any], interval: tuple[int, int], restated: set[int] | None = None) -> None:
        """A run that says ok, after a repair if it was told that data were lost."""
        try:
            act()
        except SparkFSError as error:
            if error.code != "SFS-616":
                raise
            self.fs.repair()
            act()
        if self.fs.registry.published(self.view) is None:
            return  # a repair, before anything was published
        self.published |= self.begun | set(range(*interval))
        self.begun = set()
        expected = [self.served(user, restated) for user in USERS]
        assert online(self.fs, USERS) == expected
        assert [result.ok for result in self.fs.audit()] == [True]

    def served(self, user: int, restated: set[int] | None) -> Any:
        if user in self.erased:
            return "NOT_FOUND"
        of_user = {hour for of, hour in self.table if of == user}
        rows = (restated or set()) & of_user or self.published & of_user
        return self.table[user, max(rows)] if rows else "NOT_FOUND"

    @staticmethod
    def moments(interval: tuple[int, int]) -> tuple[Any, Any]:
        return START + interval[0] * HOUR, START + interval[1] * HOUR


def test_whatever_happens_a_run_that_says_ok_leaves_the_newest_rows(
    tmp_path: Path, spark: SparkSession, setup: Sentinels
) -> None:
    """Each example is a project of its own; a failing one is printed as the steps that lead to it."""
    run_state_machine_as_test(
        lambda: Publishing(tmp_path / f"project{next(_folders)}", spark, setup),
        settings=settings(
            max_examples=2, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
        ),
    )
