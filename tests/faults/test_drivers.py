"""Drivers that are killed, told to stop, or at work side by side: the same command completes what they began."""

from __future__ import annotations

import os
import signal

import pytest

from spark_fs.errors import ConflictError, ExitCode
from tests.e2e.command import PATIENCE_SECONDS, until
from tests.faults.shop import END, MIDDLE, START, Shop, changed_payments, kill_driver, newest


def test_a_killed_driver_is_told_and_the_rerun_completes(shop: Shop) -> None:
    """Kill -9 in the middle: the caller sees a failure, nothing is noted as published, and the same command completes it."""
    command = shop.start_and_await()
    kill_driver(command)
    assert command.returncode > 0
    shop.fast()
    shop.assert_nothing_is_left(command)
    assert shop.published() is None
    assert [run["state"] for run in shop.fs.registry.runs() if run["kind"] == "materialize"] == ["running"]
    assert 0 < len(shop.online()) < len(newest(shop.payments))
    shop.settle()


def test_a_worker_that_outlives_a_killed_driver_changes_nothing(shop: Shop) -> None:
    """The driver is killed, rows are deleted, a newer run is done; then a worker of the killed run goes on writing."""
    command = shop.start_and_await()
    with shop.freeze() as zombie:
        kill_driver(command)
        shop.fast()
        shop.rebuild(changed_payments())
        shop.settle()
        before = shop.calls()
        zombie.go_on()
        assert shop.calls() > before
        assert shop.online() == newest(shop.payments)
    shop.settle()


@pytest.mark.parametrize(
    ("signal_number", "to_all", "code"),
    [(signal.SIGINT, True, ExitCode.INTERRUPTED), (signal.SIGTERM, False, ExitCode.TERMINATED)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_command_that_is_told_to_stop_leaves_nothing_behind(
    shop: Shop, signal_number: signal.Signals, to_all: bool, code: ExitCode
) -> None:
    """Ctrl-C in a terminal goes to all its processes, SIGTERM to the command alone: its exit code says so, nothing runs on."""
    command = shop.start_and_await()
    os.killpg(command.pid, signal_number) if to_all else os.kill(command.pid, signal_number)
    command.communicate(timeout=PATIENCE_SECONDS)
    assert command.returncode == code, shop.told()
    shop.fast()
    shop.assert_nothing_is_left(command)
    assert shop.published() is None
    (run,) = [run for run in shop.fs.registry.runs() if run["kind"] == "materialize"]
    assert run["state"] in ("interrupted", "failed"), shop.told()  # by SIGTERM Spark may be gone first
    shop.settle()


@pytest.mark.parametrize("first", ["backfill", "newer"])
def test_a_backfill_and_a_newer_run_at_once_end_as_one(shop: Shop, first: str) -> None:
    """Two drivers write older and newer rows of the same keys at the same time; whoever began, the newer ones stay."""
    halves = [(START, MIDDLE), (MIDDLE, END)]
    if first == "newer":
        halves.reverse()
    shop.slow()
    command = shop.start(*halves[0])
    shop.await_rows()
    shop.slow(4)  # so that the first is at it long enough
    run = shop.begin_beside(*halves[1])
    until(lambda: run.done() or len({writer.pid for writer in shop.writers()}) > 2)  # neither has more than two
    assert not run.done()
    shop.fast()
    command.communicate(timeout=PATIENCE_SECONDS)
    # Whoever ends last may find that the other one has noted something, again and again.
    overtaken = isinstance(run.exception(), ConflictError)
    assert run.exception() is None or overtaken
    assert command.returncode in (ExitCode.OK, ExitCode.CONFLICT), shop.told()
    assert shop.online() == newest(shop.payments)
    shop.settle()
