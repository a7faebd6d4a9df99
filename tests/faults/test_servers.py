"""A Redis that dies, forgets its script or is full, in the middle of a run."""

from __future__ import annotations

import threading

import pytest

from spark_fs.errors import ExitCode, SparkFSError
from tests.faults.shop import MIDDLE, START, USERS, Shop, kill_driver, newest


@pytest.mark.parametrize("before", ["nothing", "older rows"])
def test_a_server_that_comes_back_empty_is_noticed(shop: Shop, before: str) -> None:
    """Kill -9 and a restart without data in the middle of a run: either it writes all again, or it or the next one says so."""
    if before == "older rows":
        shop.fs.materialize(START, MIDDLE)
    shop.slow()
    run = shop.begin()
    shop.await_rows()
    shop.kill_server()
    shop.start_server()
    shop.fast()
    error = run.exception()
    if error is None and shop.online() != newest(shop.payments):
        with pytest.raises(SparkFSError, match="SFS-616") as caught:
            shop.fs.materialize(START, MIDDLE)
        error = caught.value
    if error is not None:
        assert isinstance(error, SparkFSError)
        assert error.code in ("SFS-601", "SFS-616")
        shop.fs.repair()
    shop.settle()


def test_a_script_that_is_lost_again_and_again_is_loaded_again_and_again(shop: Shop) -> None:
    """SCRIPT FLUSH without end: the run ends well."""
    shop.fs.materialize(START, MIDDLE)
    over = threading.Event()

    def forget() -> None:
        while not over.wait(0.002):
            shop.client.script_flush()

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        (result,) = shop.begin(MIDDLE).result()
    finally:
        over.set()
        thread.join()
    assert shop.client.info("commandstats")["cmdstat_eval"]["calls"] > 0  # type: ignore[index]
    assert (result.applied, result.stale) == (USERS, 0)
    assert shop.online() == newest(shop.payments)
    shop.settle()


def test_a_server_that_gets_full_ends_the_run_with_its_code(shop: Shop) -> None:
    """The limit is reached in the middle: SFS-603 and exit code 1; with more memory the same command completes."""
    shop.slow()
    run = shop.begin()
    shop.await_rows()
    shop.client.config_set("maxmemory", int(shop.client.info("memory")["used_memory"]) + 300_000)  # type: ignore[index]
    shop.fast()
    with pytest.raises(SparkFSError, match="SFS-603") as caught:
        run.result()
    assert caught.value.exit_code == ExitCode.FAILED
    assert shop.published() is None
    assert 0 < len(shop.online()) < USERS
    shop.client.config_set("maxmemory", 0)
    shop.settle()


def test_a_driver_and_a_server_that_die_together_are_started_again(shop: Shop) -> None:
    """What a killed run had written is lost as well: the same command writes all of it, and skips nothing as done."""
    command = shop.start_and_await()
    kill_driver(command)
    shop.kill_server()
    shop.start_server()
    shop.fast()
    shop.settle()
