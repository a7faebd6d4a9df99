"""Executors that die, are doubled and come back late, in the middle of a run: tasks are repeated, the newest rows stay."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.faults.cluster import Frozen
from tests.faults.shop import END, MIDDLE, START, USERS, Shop, changed_payments, newest

#: A copy of a task is started as soon as most of the others are done.
SPECULATION = {
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    "spark.speculation.multiplier": "1.1",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.minTaskRuntime": "100ms",
}


@pytest.mark.parametrize("victim", ["executor", "worker"])
def test_a_killed_executor_costs_no_row_and_counts_none_twice(shop: Shop, victim: str) -> None:
    """Kill -9 of the JVM, among new keys, or of its Python worker, among older rows: the job ends well, all is there."""
    start = START
    if victim == "worker":
        shop.fs.materialize(START, MIDDLE)
        start = MIDDLE
    shop.slow()
    run = shop.begin(start)
    shop.await_rows()
    writer = shop.a_writer()
    os.kill(writer.pid if victim == "worker" else shop.cluster.executor_of(writer), signal.SIGKILL)
    shop.fast()
    (result,) = run.result()
    assert result.rows_read == sum(start <= at for _, at in shop.payments)
    assert (result.applied + result.equal, result.stale, result.withdrawn) == (USERS, 0, 0)
    assert result.equal > 0  # what the victim had written before
    assert shop.online() == newest(shop.payments)
    shop.settle()


def test_a_copy_of_a_task_and_its_late_original_change_nothing(shop: Shop) -> None:
    """A worker hangs, a copy of its task runs elsewhere, the job ends, a newer run too; then the first goes on writing."""
    shop.fs.materialize(START, MIDDLE)
    shop.configured(SPECULATION)
    shop.slow()
    command = shop.start(MIDDLE, END)
    shop.await_rows()
    with shop.freeze() as original:
        shop.fast()
        out, _ = command.communicate()
        assert command.returncode == 0, shop.told()
        (result,) = json.loads(out)
        assert result["rows_read"] == USERS
        assert (result["applied"] + result["equal"], result["stale"]) == (USERS, 0)
        assert result["equal"] > 0  # what the original had written before
        assert shop.online() == newest(shop.payments)
        assert_late_writes_change_nothing(shop, original)


def test_a_worker_that_outlives_its_executor_changes_nothing(shop: Shop) -> None:
    """The JVM is gone, its task repeated, a newer run done; then its Python worker goes on writing."""
    shop.slow()
    run = shop.begin()
    shop.await_rows()
    with shop.freeze() as zombie:
        os.kill(shop.cluster.executor_of(zombie.writer), signal.SIGKILL)
        shop.fast()
        (result,) = run.result()
        assert result.applied + result.equal == USERS
        assert shop.online() == newest(shop.payments)
        assert_late_writes_change_nothing(shop, zombie)


def assert_late_writes_change_nothing(shop: Shop, late: Frozen) -> None:
    """Publish newer, corrected and deleted rows, then let a worker write the old ones that it still holds."""
    shop.rebuild(changed_payments())
    shop.settle()
    before = shop.calls()
    late.go_on()
    assert shop.calls() > before
    assert shop.online() == newest(shop.payments)
    shop.settle()
